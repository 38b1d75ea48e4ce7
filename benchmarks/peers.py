"""A training step against those of other systems, each on the same mesh with the same sharding.

    python -m benchmarks.peers                                    the whole table; starts its own processes
    python -m benchmarks.peers --size 0.5M --ranks 4 --form zero2 --steps 60
    python -m benchmarks.peers --optimizer adamw --json > rows.json

All that are compared start from the same weights, see the same batches, live in the same processes and take their steps
in turns, see ``paired``. A peer that is not installed, or stops, has a row that says why. The last column is the load
of the machine (processes that want to run, the mean of a minute) when the row was done: beyond the ranks themselves it
is other people's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer

import autopar
from benchmarks import deepspeed_parallel
from benchmarks.contenders import RATE, Autopar, AutoparPipeline, Contender, Optimizers
from benchmarks.deepspeed_parallel import DeepSpeed
from benchmarks.hugging_face_parallel import TensorPlan
from benchmarks.launch import launched, of_any_rank
from benchmarks.paired import Ratio, measure
from benchmarks.subjects import BATCH, SUBJECTS, Subject
from benchmarks.torch_parallel import TorchParallel
from benchmarks.torch_pipeline import TorchPipeline
from benchmarks.torch_three_axes import ThreeAxes

MODULE = "benchmarks.peers"
SIZES = {"0.5M": "hf-llama-128", "14M": "hf-llama-2k"}
STEPS = {"0.5M": 40, "14M": 16}
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
}
MICROBATCHES = 4
TOLERANCE = 1e-3  # of losses: those of AdamW drift apart


@dataclass(frozen=True)
class Setting:
    """What all sides of one row need."""

    subject: Subject
    optimizer: str
    ranks: int

    def finished(self, contender: Contender) -> Contender:
        return contender.updated_by(OPTIMIZERS[self.optimizer])

    def deepspeed(self, model: nn.Module, **choices: int) -> Contender:
        if why := deepspeed_parallel.missing():
            raise RuntimeError(why)
        return DeepSpeed(model, BATCH, OPTIMIZERS[self.optimizer], **choices)

    def torch(self, model: nn.Module, data: str = "ddp", tensor: int = 1) -> Contender:
        mesh = init_device_mesh("cpu", (self.ranks // tensor, tensor), mesh_dim_names=("dp", "tp"))
        if data != "zero_redundancy":
            return self.finished(TorchParallel(self.subject, model, mesh, False, data, False))
        found = TorchParallel(self.subject, model, mesh, False, "ddp", False)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[self.optimizer]
        return found.updated_by(lambda parameters: ZeroRedundancyOptimizer(parameters, kind, lr=RATE))

    def three_axes(self, model: nn.Module, data: str) -> Contender:
        mesh = init_device_mesh("cpu", tuple(_three(self.ranks).values()), mesh_dim_names=tuple(_three(self.ranks)))
        return self.finished(ThreeAxes(model, mesh, data, MICROBATCHES, self.subject.batch(0), False))

    def pipeline(self, model: nn.Module) -> Contender:
        return self.finished(TorchPipeline(model, "1f1b", MICROBATCHES, self.subject.batch(0), False))


Maker = Callable[[Setting, nn.Module], Contender]


@dataclass(frozen=True)
class Form:
    """A mesh for a number of ranks, a plan, and who does the same."""

    ranks: tuple[int, ...]
    mesh: Callable[[int], dict[str, int]]
    plan: dict[str, Any]
    peers: dict[str, Maker]


def _three(ranks: int) -> dict[str, int]:
    return {"pp": 2, "dp": ranks // 4, "tp": 2}


def _data_parallel(plan: dict[str, Any], peers: dict[str, Maker]) -> Form:
    return Form((2, 4), lambda ranks: {"dp": ranks}, plan, peers)


FORMS: dict[str, Form] = {
    "one": Form(
        (1,),
        lambda ranks: {},
        {},
        {
            "eager": lambda s, model: s.finished(Contender(model, False)),
            "Inductor": lambda s, model: s.finished(Contender(torch.compile(model), False)),  # type: ignore[arg-type]
        },
    ),
    "zero0": _data_parallel(
        {},
        {"DDP": lambda s, model: s.torch(model), "DeepSpeed ZeRO-0": lambda s, model: s.deepspeed(model, zero=0)},
    ),
    "zero1": _data_parallel(
        {"zero": 1},
        {
            "DDP + ZeroRedundancyOptimizer": lambda s, model: s.torch(model, "zero_redundancy"),
            "DeepSpeed ZeRO-1": lambda s, model: s.deepspeed(model, zero=1),
        },
    ),
    "zero2": _data_parallel(
        {"zero": 2},
        {
            "FSDP2, kept": lambda s, model: s.torch(model, "fully_shard_kept"),
            "DeepSpeed ZeRO-2": lambda s, model: s.deepspeed(model, zero=2),
        },
    ),
    "zero3": _data_parallel(
        {"zero": 3},
        {
            "FSDP2": lambda s, model: s.torch(model, "fully_shard"),
            "DeepSpeed ZeRO-3": lambda s, model: s.deepspeed(model, zero=3),
        },
    ),
    "tp": Form(
        (2, 4),
        lambda ranks: {"tp": ranks},
        {},
        {
            "DTensor": lambda s, model: s.torch(model, tensor=s.ranks),
            "transformers tp_plan": lambda s, model: s.finished(TensorPlan(model, False)),
            "DeepSpeed AutoTP": lambda s, model: s.deepspeed(model, tensor=s.ranks),
        },
    ),
    "pp": Form(
        (2, 4),
        lambda ranks: {"pp": ranks},
        {"schedule": "1f1b", "microbatches": MICROBATCHES},
        {"torch 1F1B": lambda s, model: s.pipeline(model)},
    ),
    "3d": Form(
        (4, 8),
        _three,
        {"schedule": "1f1b", "microbatches": MICROBATCHES},
        {
            "torch, DDP": lambda s, model: s.three_axes(model, "ddp"),
            "torch, FSDP2": lambda s, model: s.three_axes(model, "fully_shard"),
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """Of one peer: medians of a step; ratios ours / peer of the clock and of the processors of all ranks; the largest
    difference of losses. ``why`` there are no numbers."""

    size: str
    ranks: int
    form: str
    peer: str
    ours_ms: float = 0.0
    peer_ms: float = 0.0
    wall: str = ""
    cpu: str = ""
    loss_difference: float = 0.0
    load: float = 0.0
    why: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        _work(options)
        return 0
    rows = []
    for size in options.size:
        for ranks in options.ranks:
            forms = [name for name in options.form if ranks in FORMS[name].ranks]
            if not forms or (ranks == 8 and size != "0.5M"):  # those share two cores
                continue
            given = ["--size", size, "--ranks", ranks, "--optimizer", options.optimizer, "--form", *forms]
            steps = options.steps or STEPS[size]
            rows += launched(MODULE, ranks, [*given, "--steps", steps, "--warm-up", options.warm_up])
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(
            _table([Row(**row) for row in rows], options.optimizer)
        )
    return 1 if any(not row["loss_difference"] <= TOLERANCE for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--steps", type=int, help="measured steps of each side (default: by size)")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes its rows there
    return parser


# ---------------------------------------------------------------- ranks


def _work(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    (size,) = options.size
    rows: list[Row] = []
    for form in options.form:
        rows += _measured(size, form, options)
        gc.collect()  # DistributedDataParallel has to go before its group, or the process may never end
        if dist.get_rank() == 0:
            for row in rows[-len(FORMS[form].peers) :]:
                print(f"{size} x {row.ranks} {form}, {row.peer}: {row.wall or row.why}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


def _measured(size: str, name: str, options: argparse.Namespace) -> list[Row]:
    form = FORMS[name]
    setting = Setting(SUBJECTS[SIZES[size]], options.optimizer, dist.get_world_size())
    torch.manual_seed(0)
    model = setting.subject.build()
    sides: list[Contender] = []
    found: dict[str, Row] = {}
    for peer, make in form.peers.items():
        side, why = None, ""
        try:
            side = make(setting, copy.deepcopy(model))
        except Exception as problem:  # it says so in the table
            why = f"{problem}".strip().splitlines()[0]
        why = of_any_rank(why)
        if why or side is None:
            found[peer] = Row(size, setting.ranks, name, peer, why=why[:90])
        else:
            sides.append(side)
    peers = [peer for peer in form.peers if peer not in found]
    ours = _ours(setting, form, model)
    times, difference = measure((ours, *sides), setting.subject.batch, options.steps, options.warm_up)
    load = os.getloadavg()[0]
    for peer, theirs in zip(peers, times[1:]):
        middles = [1e3 * sorted(side.wall)[len(side.wall) // 2] for side in (times[0], theirs)]
        ratios = [str(Ratio.of(getattr(times[0], clock), getattr(theirs, clock))) for clock in ("wall", "cpu")]
        found[peer] = Row(size, setting.ranks, name, peer, *middles, *ratios, difference, load)
    return [found[peer] for peer in form.peers]


def _ours(setting: Setting, form: Form, model: nn.Module) -> Contender:
    kind = AutoparPipeline if "microbatches" in form.plan else Autopar
    mesh, plan = autopar.Mesh(**form.mesh(setting.ranks)), autopar.Plan(**form.plan)
    return setting.finished(kind(model, mesh, plan, setting.subject.batch(0), False))


# ---------------------------------------------------------------- the table


def _table(rows: Sequence[Row], optimizer: str) -> Table:
    title = f"a step: forward, backward, {optimizer}; float32, gloo, one thread a process; ratios autopar / peer"
    table = Table("size", "ranks", "form", "peer", title=title, title_justify="left")
    for name in ("autopar ms", "peer ms", "clock", "processors", "load"):
        table.add_column(name, justify="right")
    for row in rows:
        head = [row.size, str(row.ranks), row.form, row.peer]
        if row.why:
            table.add_row(*head, "", "", row.why, "", "")
            continue
        middle = [f"{row.ours_ms:.1f}", f"{row.peer_ms:.1f}", row.wall, row.cpu, f"{row.load:.1f}"]
        table.add_row(*head, *middle)
    return table


if __name__ == "__main__":
    sys.exit(main())
