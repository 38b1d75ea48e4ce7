"""Time and peak memory of a training step on a pipeline, against ``torch.distributed.pipelining``.

    python -m benchmarks.pipeline_step                              pp=2 and pp=4; starts its own processes
    python -m benchmarks.pipeline_step --ranks 2 --schedule 1f1b zb-v --steps 40 --optimizer fused
    python -m benchmarks.pipeline_step --skip memory --json > rows.json

autopar cuts the unmodified model by itself; the peer's stages are cut by hand, see ``torch_pipeline``. Both have the
same weights and batches, live in the same processes and take their steps in turns. Memory is that of a run of its own
for each side, of the rank that has most, as in ``zero_step``. The bubble is that of autopar's steps by the clock, all
ranks together, beside that of the schedule where each compute takes the time that was measured for it, and beside the
formula.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import autopar
from autopar.schedules.instructions import Kind
from autopar.schedules.named import NAMES
from autopar.schedules.timing import Timeline, timeline
from benchmarks.contenders import AutoparPipeline, Contender
from benchmarks.launch import launched
from benchmarks.paired import Comparison, Ratio, compare, held_and_peak
from benchmarks.process_memory import EXACT
from benchmarks.subjects import SUBJECTS, Batch, Subject
from benchmarks.torch_pipeline import SCHEDULES, TorchPipeline

MODULE = "benchmarks.pipeline_step"
SIDES = ("autopar", "peer")
ROWS = 16  # of a batch
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Timing(Comparison):
    """Of one schedule. ``bubble`` is measured, ``ideal`` that of the schedule with the measured computes; medians."""

    schedule: str
    bubble: float
    ideal: float


@dataclass(frozen=True)
class Memory:
    """Bytes: allocated between steps; at the peak of a step."""

    schedule: str
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
        print(f"pp={row['ranks']}, {row['schedule']}: losses differ by {row['loss_difference']:.1e}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", choices=[name for name in SUBJECTS if name.startswith("hf")], default="hf-llama-256-8"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--optimizer", choices=("loop", "fused"), default="loop", help="how AdamW is run")
    parser.add_argument("--skip", choices=("time", "memory"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes its rows there
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)  # measure this side's memory
    return parser


def _rows(options: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    given = ["--model", options.model, "--microbatches", options.microbatches, "--warm-up", options.warm_up]
    given += ["--optimizer", options.optimizer, "--schedule"]
    sizes = {"ranks": ranks, "microbatches": options.microbatches}
    rows: list[dict[str, Any]] = [{**sizes, "schedule": schedule} for schedule in options.schedule]
    if options.skip != "time":
        found = launched(MODULE, ranks, [*given, *options.schedule, "--steps", options.steps])
        rows = [row | entry for row, entry in zip(rows, found)]
    for row in rows if options.skip != "memory" else ():
        for side in SIDES:
            (row[side],) = launched(MODULE, ranks, [*given, row["schedule"], "--steps", 3, "--only", side], EXACT)
    return rows


# ---------------------------------------------------------------- ranks


def _work(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = _memory if options.only else _timing
    rows = []
    for schedule in options.schedule:
        rows.append(measured(SUBJECTS[options.model], schedule, options))
        gc.collect()
        if dist.get_rank() == 0:
            print(f"pp={dist.get_world_size()}, {rows[-1]}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps([asdict(row) for row in rows]))
    dist.destroy_process_group()


def _timing(subject: Subject, schedule: str, options: argparse.Namespace) -> Timing:
    torch.manual_seed(0)
    model = subject.build()
    peer = _peer(subject, copy.deepcopy(model), schedule, options)
    ours = _ours(subject, model, schedule, options)
    found = compare(ours, peer, lambda number: _batch(subject, number), options.steps, options.warm_up)
    bubbles = []
    for number in range(9):
        ours.forward(_batch(subject, number))
        measured = ours.parallel.timeline()
        bubbles.append((measured.bubble, _ideal(measured, ours)))
    bubble, ideal = map(statistics.median, zip(*bubbles))
    return Timing(schedule=schedule, bubble=bubble, ideal=ideal, **vars(found))


def _ideal(measured: Timeline, ours: AutoparPipeline) -> float:
    """The bubble of the schedule where messages take no time, and computes the median of what they took."""
    taken = defaultdict[tuple[Kind, int], list[float]](list)
    for event in (event for events in measured.ranks for event in events):
        taken[event.kind, event.stage].append(event.end_s - event.start_s)
    schedule = ours.parallel.program.schedule
    assert schedule is not None
    return timeline(schedule, {of: statistics.median(times) for of, times in taken.items()}).bubble


def _memory(subject: Subject, schedule: str, options: argparse.Namespace) -> Memory:
    torch.manual_seed(0)
    side = _ours if options.only == "autopar" else _peer

    def make() -> Contender:
        return side(subject, subject.build(), schedule, options)

    found = held_and_peak(make, lambda number: _batch(subject, number), options.steps, options.warm_up)
    return Memory(schedule, *found)


def _batch(subject: Subject, number: int) -> Batch:
    return subject.batch(number, ROWS)


def _ours(subject: Subject, model: torch.nn.Module, schedule: str, options: argparse.Namespace) -> AutoparPipeline:
    mesh = autopar.Mesh(pp=dist.get_world_size())
    plan = autopar.Plan(schedule=schedule, microbatches=options.microbatches)
    return AutoparPipeline(model, mesh, plan, _batch(subject, 0), options.optimizer == "fused")


def _peer(subject: Subject, model: torch.nn.Module, schedule: str, options: argparse.Namespace) -> Contender:
    fused = options.optimizer == "fused"
    return TorchPipeline(model, schedule, options.microbatches, _batch(subject, 0), fused)


# ---------------------------------------------------------------- the table


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    title = "a step: forward, backward, AdamW; fp32, gloo, one thread a process"
    table = Table("pp", "schedule", title=title, title_justify="left")
    for name in ("ms", "peer ms", "clock", "cpu", "MB", "peer MB", "peak", "between", "bubble", "ideal", "formula"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["ranks"]), row["schedule"], *_time_cells(row), *_memory_cells(row), *_bubbles(row))
    return table


def _time_cells(row: dict[str, Any]) -> list[str]:
    if "wall" not in row:
        return [""] * 4
    ratios = [str(Ratio(**row[clock])) for clock in ("wall", "cpu")]
    return [f"{row['ours_ms']:.0f}", f"{row['peer_ms']:.0f}", *ratios]


def _memory_cells(row: dict[str, Any]) -> list[str]:
    """Peaks, and the ratios of the peaks and of what is held between steps."""
    if "peer" not in row:
        return [""] * 4
    ours, peer = row["autopar"], row["peer"]
    peaks = [f"{side['peak'] / 1e6:.1f}" for side in (ours, peer)]
    return [*peaks, *(f"{ours[what] / peer[what]:.2f}" for what in ("peak", "between"))]


def _bubbles(row: dict[str, Any]) -> list[str]:
    if "bubble" not in row:
        return []
    name = row["schedule"]
    value = NAMES[name].bubble.value(row["ranks"], row["microbatches"], SCHEDULES[name][1])
    return [f"{row['bubble']:.1%}", f"{row['ideal']:.1%}", "" if value is None else f"{value:.1%}"]


if __name__ == "__main__":
    sys.exit(main())
