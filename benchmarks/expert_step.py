"""Time and peak memory of a training step with experts dealt out, against replicated experts and layers by hand.

    python -m benchmarks.expert_step                         ep=2 and ep=4; starts its own processes
    python -m benchmarks.expert_step --ranks 2 --peer torchtitan --rounds 40 --skip memory

A step is forward, backward and AdamW (fused) in float32, gloo, one thread a process. All sides start from the same
weights, live in the same processes and take their steps in turns; memory is measured in runs of their own, as in
``zero_step``. The peers:

    replicated   autopar on dp = n: every rank has all experts
    torchtitan   an expert-parallel layer by hand in torchtitan's scheme, see ``torch_experts``
    deepspeed    DeepSpeed's engine with its own layer of experts, see ``deepspeed_experts``
    autoep       DeepSpeed's engine, which replaces the layers of the unmodified model

A peer that is not installed, or cannot be made, has a row that says why.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import sys
import tempfile
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

import autopar
from benchmarks import deepspeed_experts, deepspeed_parallel
from benchmarks.contenders import Autopar, Contender
from benchmarks.launch import launched, of_any_rank
from benchmarks.paired import Comparison, Ratio, held_and_peak, measure, phases_text
from benchmarks.process_memory import EXACT
from benchmarks.subjects import SUBJECTS, Subject
from benchmarks.torch_experts import HandWritten

MODULE = "benchmarks.expert_step"
OURS, REPLICATED, BY_HAND, LAYERS, AUTOMATIC = "autopar", "replicated", "torchtitan", "deepspeed", "autoep"
PEERS = (REPLICATED, BY_HAND, LAYERS, AUTOMATIC)
TOLERANCE = 1e-4
Row = dict[str, Any]


@dataclass(frozen=True)
class Timing(Comparison):
    """Against one peer. ``sent``: bytes that rank 0 sends in a step, ours and the peer's. ``load``: of the machine, the
    mean of the last minute, when it had ended."""

    ours_sent: int
    peer_sent: int
    compile_seconds: float
    load: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one side: allocated between steps; at the peak of a step."""

    between: int
    peak: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        _work(options)
        return 0
    rows = [row for ranks in options.ranks for row in _rows(options, ranks)]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 170).print(_table(rows))
    wrong = [row for row in rows if row.get("loss_difference", 0.0) > TOLERANCE]
    for row in wrong:
        print(f"ep={row['ranks']}, {row['peer']}: losses differ by {row['loss_difference']:.1e}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default="hf-mixtral-256")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--skip", choices=("time", "memory"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes its rows there
    parser.add_argument("--only", choices=(OURS, *PEERS), help=argparse.SUPPRESS)  # measure this side's memory
    return parser


def _rows(options: argparse.Namespace, ranks: int) -> list[Row]:
    given = ["--model", options.model, "--warm-up", options.warm_up, "--peer", *options.peer]
    rows: list[Row] = [{"ranks": ranks, "peer": peer} for peer in options.peer]
    if options.skip != "time":
        found = launched(MODULE, ranks, [*given, "--rounds", options.rounds])
        rows = [row | entry for row, entry in zip(rows, found)]
    if options.skip != "memory":
        measured = [row for row in rows if "why" not in row]
        ours, *peers = (_memory_of(side, ranks, given) for side in (OURS, *(row["peer"] for row in measured)))
        for row, peer in zip(measured, peers, strict=True):
            row |= peer if "why" in peer else {"ours_memory": ours, "peer_memory": peer}
    return rows


def _memory_of(side: str, ranks: int, given: Sequence[object]) -> Row:
    """Of one side, which its ranks compile once."""
    with tempfile.TemporaryDirectory() as cache:
        given = [*given, "--warm-up", 1, "--rounds", 3, "--only", side]
        found: Row = launched(MODULE, ranks, given, {**EXACT, "AUTOPAR_CACHE": cache})
        return found


# ---------------------------------------------------------------- ranks


def _work(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = _memory(options) if options.only else _timings(options)
    gc.collect()  # the sides go before their groups
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps(found))
        print(f"ep={dist.get_world_size()}, {options.only or found}", file=sys.stderr, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _timings(options: argparse.Namespace) -> list[Row]:
    subject = SUBJECTS[options.model]
    torch.manual_seed(0)
    model = subject.build()
    sides: dict[str, Contender] = {}
    found: dict[str, Row] = {}
    for name in (OURS, *options.peer):
        side, why = _made(name, copy.deepcopy(model), subject)
        if side is None:
            found[name] = {"why": why}
        else:
            sides[name] = side
    ours = sides.pop(OURS)
    assert isinstance(ours, Autopar)
    (mine, *theirs), difference = measure((ours, *sides.values()), subject.batch, options.rounds, options.warm_up)
    steps, load = options.rounds + options.warm_up, os.getloadavg()[0]
    for (name, peer), times in zip(sides.items(), theirs):
        timing = Timing(
            **vars(Comparison.of(mine, times, difference)),
            ours_sent=_sent(ours, steps),
            peer_sent=_sent(peer, steps),
            compile_seconds=ours.compile_seconds,
            load=load,
        )
        found[name] = asdict(timing)
    return [found[name] for name in options.peer]


def _made(name: str, model: nn.Module, subject: Subject) -> tuple[Contender | None, str]:
    """A side; or, on every rank, None with the reason why DeepSpeed cannot make it. Collective."""
    if name not in (LAYERS, AUTOMATIC):
        return SIDES[name](model, subject), ""
    side, why = None, deepspeed_parallel.missing()
    try:
        side = None if why else SIDES[name](model, subject)
    except Exception as problem:  # it says so in the table
        why = f"{problem}".strip().splitlines()[0][:90]
    why = of_any_rank(why)
    return (None, why) if why else (side, "")


def _memory(options: argparse.Namespace) -> Row:
    subject = SUBJECTS[options.model]
    torch.manual_seed(0)
    side, why = _made(options.only, subject.build(), subject)
    if side is None:
        return {"why": why}
    measure((side,), subject.batch, 1, options.warm_up)  # what is loaded on first use does not count
    del side

    def make() -> Contender:
        return SIDES[options.only](subject.build(), subject)

    return asdict(Memory(*held_and_peak(make, subject.batch, options.rounds, options.warm_up)))


def _ours(axis: str) -> Callable[[nn.Module, Subject], Contender]:
    def side(model: nn.Module, subject: Subject) -> Contender:
        mesh = autopar.Mesh(**{axis: dist.get_world_size()})
        return Autopar(model, mesh, autopar.Plan(), subject.batch(0), True)

    return side


def _by_hand(model: nn.Module, subject: Subject) -> Contender:
    return HandWritten(model, True)


def _deepspeed(kind: type[deepspeed_experts.Experts]) -> Callable[[nn.Module, Subject], Contender]:
    return lambda model, subject: kind(model, True)


SIDES = {
    OURS: _ours("ep"),
    REPLICATED: _ours("dp"),
    BY_HAND: _by_hand,
    LAYERS: _deepspeed(deepspeed_experts.Layers),
    AUTOMATIC: _deepspeed(deepspeed_experts.Automatic),
}


def _sent(side: Contender, steps: int) -> int:
    """Bytes of a step, on the mean of ``steps``; collective."""
    if isinstance(side, Autopar):
        return side.sent().total() // steps
    return side.sent() if isinstance(side, HandWritten | deepspeed_experts.Experts) else 0


# ---------------------------------------------------------------- the table


def _table(rows: Sequence[Row]) -> Table:
    """f/b/o: milliseconds of processor time that forward, backward and optimizer take on rank 0. Ratios are ours / the
    peer's."""
    title = "a step: forward, backward, AdamW; fp32, gloo, one thread a process"
    table = Table("ep", "peer", title=title, title_justify="left")
    for name in ("ms", "peer ms", "clock", "cpu", "f/b/o", "peer f/b/o", "sent MB", "peer", "loss", "load"):
        table.add_column(name, justify="right")
    for name in ("peak MB", "peer", "peak", "between"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row["why"]] if "why" in row else [*_time_cells(row), *_memory_cells(row)]
        table.add_row(str(row["ranks"]), row["peer"], *cells)
    return table


def _time_cells(row: Row) -> list[str]:
    if "wall" not in row:
        return [""] * 10
    return [
        f"{row['ours_ms']:.0f}",
        f"{row['peer_ms']:.0f}",
        *(str(Ratio(**row[clock])) for clock in ("wall", "cpu")),
        *(phases_text(row[side]) for side in ("ours_phases", "peer_phases")),
        *(f"{row[side] / 1e6:.1f}" for side in ("ours_sent", "peer_sent")),
        f"{row['loss_difference']:.0e}",
        f"{row['load']:.1f}",
    ]


def _memory_cells(row: Row) -> list[str]:
    if "peer_memory" not in row:
        return []
    ours, peer = row["ours_memory"], row["peer_memory"]
    peaks = [f"{side['peak'] / 1e6:.1f}" for side in (ours, peer)]
    return [*peaks, *(f"{ours[what] / peer[what]:.2f}" for what in ("peak", "between"))]


if __name__ == "__main__":
    sys.exit(main())
