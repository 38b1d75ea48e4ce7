"""Time of a training step: the program of autopar against the same model parallelised by hand with torch's own parts.

    python -m benchmarks.dp_tp_step                     some minutes on two cores; starts its own processes
    python -m benchmarks.dp_tp_step --mesh dp=4 --model hf-llama-512 --steps 50 --optimizer loop fused
    python -m benchmarks.dp_tp_step --json > rows.json

Both start from the same weights, see the same batches, live in the same processes and take their steps in turns; a
step is forward, backward and AdamW. ``torch_parallel`` describes the peer; in the row of one process
it is the unmodified model itself.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

import autopar
from benchmarks.contenders import Autopar, Contender
from benchmarks.launch import launched
from benchmarks.paired import Comparison, Ratio, compare, phases_text
from benchmarks.subjects import SUBJECTS, Subject
from benchmarks.torch_parallel import DATA_FORMS, TorchParallel

TOLERANCE = 1e-4
OPTIMIZERS = ("loop", "fused")  # AdamW(...), on CPUs a loop over the parameters, and AdamW(..., fused=True)
MODELS = ("hf-llama-256", "our-llama-256")
MESHES = ("1", "dp=2,tp=2", "dp=2,tp=2,megatron", "dp=4", "tp=4")


@dataclass(frozen=True)
class Row(Comparison):
    """One model on one mesh; ``sent`` are the bytes that rank 0 sends in one step of ours, by axis."""

    model: str
    mesh: str
    optimizer: str
    sent: dict[str, int]
    compile_seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        _work(options)
        return 0
    rows: list[Row] = []
    for ranks in sorted({_ranks(mesh) for mesh in options.mesh}):
        rows += _launched(options, ranks, [mesh for mesh in options.mesh if _ranks(mesh) == ranks])
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(_table(rows))
    wrong = [row for row in rows if not row.loss_difference <= TOLERANCE]
    for row in wrong:
        print(f"{row.model} on {row.mesh}: losses differ by {row.loss_difference:.1e}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dp_tp_step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=SUBJECTS, default=MODELS)
    parser.add_argument("--mesh", nargs="+", default=MESHES, help=f"default: {' '.join(MESHES)}")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--data", choices=DATA_FORMS, default="ddp", help="the peer's data parallelism")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["loop"], help="how AdamW is run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes its rows there
    return parser


# ---------------------------------------------------------------- processes


def _launched(options: argparse.Namespace, ranks: int, meshes: list[str]) -> list[Row]:
    """The rows of ``meshes``, all of ``ranks`` processes, measured under torchrun."""
    arguments = ["--mesh", *meshes, "--model", *options.model, "--steps", options.steps, "--warm-up", options.warm_up]
    arguments += ["--data", options.data, "--optimizer", *options.optimizer]
    return [_row(entry) for entry in launched("benchmarks.dp_tp_step", ranks, arguments)]


def _row(entry: dict[str, object]) -> Row:
    ratios = {name: Ratio(**entry[name]) for name in ("wall", "cpu")}  # type: ignore[arg-type]
    return Row(**{**entry, **ratios})  # type: ignore[arg-type]


def _work(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for mesh, model, optimizer in itertools.product(options.mesh, options.model, options.optimizer):
        rows.append(_measured(SUBJECTS[model], mesh, optimizer, options))
        if dist.get_rank() == 0:
            print(f"{model} on {mesh}, {optimizer}: {rows[-1].wall}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps([asdict(row) for row in rows]))
    dist.destroy_process_group()


def _measured(subject: Subject, mesh: str, optimizer: str, options: argparse.Namespace) -> Row:
    torch.manual_seed(0)
    fused = optimizer == "fused"
    model = subject.build()
    peer = _peer(subject, copy.deepcopy(model), mesh, options.data, fused)
    plan = autopar.Plan(sequence="megatron" if "megatron" in mesh else "none")
    ours = Autopar(model, autopar.Mesh(**_sizes(mesh)), plan, subject.batch(0), fused)
    before = ours.sent()
    found = compare(ours, peer, subject.batch, options.steps, options.warm_up)
    steps = options.steps + options.warm_up
    return Row(
        model=subject.name,
        mesh=mesh,
        optimizer=optimizer,
        sent={axis: count // steps for axis, count in (ours.sent() - before).items()},
        compile_seconds=ours.compile_seconds,
        **vars(found),
    )


def _peer(subject: Subject, model: torch.nn.Module, mesh: str, data: str, fused: bool) -> Contender:
    if _ranks(mesh) == 1:
        return Contender(model, fused)
    sizes = _sizes(mesh)
    device_mesh = init_device_mesh("cpu", (sizes.get("dp", 1), sizes.get("tp", 1)), mesh_dim_names=("dp", "tp"))
    return TorchParallel(subject, model, device_mesh, "megatron" in mesh, data, fused)


def _sizes(mesh: str) -> dict[str, int]:
    """``dp=2,tp=2,megatron`` -> {dp: 2, tp: 2}; ``1`` has no axes."""
    pairs = (part.split("=") for part in mesh.split(",") if "=" in part)
    return {axis: int(size) for axis, size in pairs}


def _ranks(mesh: str) -> int:
    sizes = _sizes(mesh)
    return sizes.get("dp", 1) * sizes.get("tp", 1)


# ---------------------------------------------------------------- the table


COLUMNS = ("autopar ms", "peer ms", "clock ratio", "cpu ratio", "autopar f/b/o", "peer f/b/o", "sent a step", "loss")


def _table(rows: Sequence[Row]) -> Table:
    """f/b/o: milliseconds of processor time that forward, backward and optimizer take on rank 0."""
    title = "a step: forward, backward, AdamW; fp32, gloo, one thread a process"
    table = Table("model", "mesh", "AdamW", title=title, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        phases = [phases_text(side) for side in (row.ours_phases, row.peer_phases)]
        sent = " ".join(f"{axis} {count / 1e6:.1f}MB" for axis, count in sorted(row.sent.items()))
        cells = [row.model, row.mesh, row.optimizer, f"{row.ours_ms:.0f}", f"{row.peer_ms:.0f}"]
        table.add_row(*cells, str(row.wall), str(row.cpu), *phases, sent, f"{row.loss_difference:.0e}")
    return table


if __name__ == "__main__":
    sys.exit(main())
