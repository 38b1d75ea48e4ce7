"""Time and peak memory of a training step with ZeRO, against torch's own sharded data parallelism.

    python -m benchmarks.zero_step                                  dp=2 and dp=4, zero 0 to 3; starts its own processes
    python -m benchmarks.zero_step --ranks 2 --zero 3 --model hf-llama-512 --steps 40 --optimizer fused
    python -m benchmarks.zero_step --skip memory --json > rows.json

The peers: DDP (zero 0), DDP with ``ZeroRedundancyOptimizer`` (1), ``fully_shard`` of each block and of the root that
keeps parameters after forward (2) or lets them go (3). Times are taken in the same processes, in turns, from the same
weights and batches. Memory is that of a run of its own for each side, so that neither counts the other's: what is
allocated between steps, and beyond that the resident memory that a step adds at its peak, buffers of collectives
included; of the rank that has most.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

import autopar
from benchmarks.contenders import Autopar, Contender
from benchmarks.launch import launched
from benchmarks.paired import Comparison, Ratio, compare, held_and_peak, phases_text
from benchmarks.process_memory import EXACT
from benchmarks.subjects import SUBJECTS, Subject
from benchmarks.torch_parallel import TorchParallel

MODULE = "benchmarks.zero_step"
PEERS = ("ddp", "zero_redundancy", "fully_shard_kept", "fully_shard")  # by stage
SIDES = ("autopar", "peer")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Timing(Comparison):
    """Of one stage."""

    zero: int


@dataclass(frozen=True)
class Memory:
    """Bytes: allocated between steps; at the peak of a step."""

    zero: int
    between: int
    peak: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        _work(options)
        return 0
    rows = [row for model in options.model for ranks in options.ranks for row in _rows(options, model, ranks)]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 170).print(_table(rows))
    wrong = [row for row in rows if row.get("loss_difference", 0.0) > TOLERANCE]
    for row in wrong:
        print(f"dp={row['ranks']}, zero={row['zero']}: losses differ by {row['loss_difference']:.1e}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=SUBJECTS, default=["hf-llama-512"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--zero", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3])
    parser.add_argument("--steps", type=int, default=24, help="measured steps of each side")
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--optimizer", choices=("loop", "fused"), default="loop", help="how AdamW is run")
    parser.add_argument("--skip", choices=("time", "memory"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes its rows there
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)  # measure this side's memory
    return parser


def _rows(options: argparse.Namespace, model: str, ranks: int) -> list[dict[str, Any]]:
    given = ["--model", model, "--zero", *options.zero, "--warm-up", options.warm_up, "--optimizer", options.optimizer]
    rows: list[dict[str, Any]] = [{"model": model, "ranks": ranks, "zero": zero} for zero in options.zero]
    if options.skip != "time":
        found = launched(MODULE, ranks, [*given, "--steps", options.steps])
        rows = [row | entry for row, entry in zip(rows, found)]
    if options.skip != "memory":
        for side in SIDES:
            found = launched(MODULE, ranks, [*given, "--steps", 3, "--only", side], EXACT)
            rows = [row | {side: entry} for row, entry in zip(rows, found)]
    return rows


# ---------------------------------------------------------------- ranks


def _work(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = _memory if options.only else _timing
    if options.only:
        _memory(SUBJECTS[options.model[0]], 0, options)  # what is loaded on first use counts for no stage
    rows = []
    for zero in options.zero:
        rows.append(measured(SUBJECTS[options.model[0]], zero, options))
        gc.collect()
        if dist.get_rank() == 0:
            print(f"{options.model[0]}, dp={dist.get_world_size()}, {rows[-1]}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps([asdict(row) for row in rows]))
    dist.destroy_process_group()


def _timing(subject: Subject, zero: int, options: argparse.Namespace) -> Timing:
    torch.manual_seed(0)
    model = subject.build()
    peer = _peer(subject, copy.deepcopy(model), zero, options)
    ours = _ours(subject, model, zero, options)
    found = compare(ours, peer, subject.batch, options.steps, options.warm_up)
    return Timing(zero=zero, **vars(found))


def _memory(subject: Subject, zero: int, options: argparse.Namespace) -> Memory:
    torch.manual_seed(0)
    side = _ours if options.only == "autopar" else _peer

    def make() -> Contender:
        return side(subject, subject.build(), zero, options)

    return Memory(zero, *held_and_peak(make, subject.batch, options.steps, options.warm_up))


def _ours(subject: Subject, model: torch.nn.Module, zero: int, options: argparse.Namespace) -> Contender:
    mesh, plan = autopar.Mesh(dp=dist.get_world_size()), autopar.Plan(zero=zero)
    return Autopar(model, mesh, plan, subject.batch(0), options.optimizer == "fused")


def _peer(subject: Subject, model: torch.nn.Module, zero: int, options: argparse.Namespace) -> Contender:
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("dp", "tp"))
    return TorchParallel(subject, model, mesh, False, PEERS[zero], options.optimizer == "fused")


# ---------------------------------------------------------------- the table


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """f/b/o: milliseconds of processor time that forward, backward and optimizer take on rank 0."""
    table = Table("model", "dp", "zero", "peer", title="a step, fp32, gloo, one thread a process", title_justify="left")
    for name in ("ms", "peer ms", "clock", "cpu", "f/b/o", "peer f/b/o", "MB", "peer MB", "peak", "between"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row["model"], str(row["ranks"]), str(row["zero"]), PEERS[row["zero"]]]
        table.add_row(*cells, *_time_cells(row), *_memory_cells(row))
    return table


def _time_cells(row: dict[str, Any]) -> list[str]:
    if "wall" not in row:
        return [""] * 6
    phases = [phases_text(row[side]) for side in ("ours_phases", "peer_phases")]
    ratios = [str(Ratio(**row[clock])) for clock in ("wall", "cpu")]
    return [f"{row['ours_ms']:.0f}", f"{row['peer_ms']:.0f}", *ratios, *phases]


def _memory_cells(row: dict[str, Any]) -> list[str]:
    """Peaks, and the ratios of the peaks and of what is held between steps."""
    if "peer" not in row:
        return []
    ours, peer = row["autopar"], row["peer"]
    peaks = [f"{side['peak'] / 1e6:.1f}" for side in (ours, peer)]
    return [*peaks, *(f"{ours[what] / peer[what]:.2f}" for what in ("peak", "between"))]


if __name__ == "__main__":
    sys.exit(main())
