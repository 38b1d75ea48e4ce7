"""Time of a training step with the sequence split, against rings and all-to-alls written by hand and the unsplit model.

    python -m benchmarks.sequence_step                       n = 1, 2 and 4, lengths 2k to 8k; starts its own processes
    python -m benchmarks.sequence_step --ranks 2 --length 8192 --form ring --peer ring alone --seconds 120

A step is forward, backward and AdamW (fused) of one sequence in float32, gloo, one thread a process. All sides start
from the same weights, live in the same processes and take their steps in turns. The peers are those of
``torch_sequence``; ``alone`` is the unmodified model on rank 0 while the other ranks wait. Gradients are all-reduced by
DDP there and by the program here. As many rounds are measured as fit in ``--seconds``, at least ``LEAST``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

import autopar
from benchmarks.contenders import Autopar, Contender
from benchmarks.launch import launched
from benchmarks.paired import Ratio, Times, measure, phases_text
from benchmarks.subjects import SUBJECTS, Batch, Subject
from benchmarks.torch_sequence import ATTENTIONS, Alone, HandWritten, has_deepspeed

MODULE = "benchmarks.sequence_step"
FORMS = ("ring", "ulysses", "gather", "hybrid", "auto")
PEERS = (*ATTENTIONS, "alone")
LENGTHS = {1: (4096,), 2: (2048, 4096, 8192), 4: (2048, 4096)}  # by default, of n ranks
LEAST = 3
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One side on n ranks: milliseconds a step, processor seconds of all ranks, milliseconds of the phases on rank 0 by
    clock. Of autopar's sides also: ``ratios`` to each peer by clock (``wall``, ``cpu``), bytes that rank 0 sends in a
    step, seconds of compiling. ``load``: of the machine, the mean of the last minute, when it had ended."""

    side: str
    ranks: int
    length: int
    rounds: int
    ms: float
    cpu_seconds: float
    phases: dict[str, dict[str, float]]
    ratios: dict[str, dict[str, Ratio]]
    sent: int
    compile_seconds: float
    loss_difference: float
    load: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        _work(options)
        return 0
    rows: list[Row] = []
    for ranks in options.ranks:
        lengths = options.length or LENGTHS.get(ranks, (4096,))
        given = ["--length", *lengths, "--form", *options.form, "--peer", *options.peer]
        given += ["--seconds", options.seconds, "--model", options.model]
        rows += map(_row, launched(MODULE, ranks, given, {"DS_ACCELERATOR": "cpu"}))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(_table(rows, options.peer))
    wrong = [row for row in rows if not row.loss_difference <= TOLERANCE]
    for row in wrong:
        print(f"{row.side} on sp={row.ranks}: losses differ by {row.loss_difference:.1e}", file=sys.stderr)
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default="hf-llama-long")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--length", nargs="+", type=int, help="default: 2048 to 8192, by the ranks")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=["ring", _all_to_all(), "alone"])
    parser.add_argument("--seconds", type=float, default=90, help="of measured rounds, for each length")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes its rows there
    return parser


def _all_to_all() -> str:
    return "deepspeed" if has_deepspeed() else "ulysses"


def _row(entry: dict[str, dict[str, dict[str, dict[str, float]]]]) -> Row:
    ratios = {
        peer: {clock: Ratio(**found) for clock, found in clocks.items()} for peer, clocks in entry["ratios"].items()
    }
    return Row(**{**entry, "ratios": ratios})  # type: ignore[arg-type]


# ---------------------------------------------------------------- ranks


def _work(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows: list[Row] = []
    for length in options.length:
        rows += _measured(SUBJECTS[options.model], length, options)
        gc.collect()  # the sides go before their groups
        if dist.get_rank() == 0:
            print(f"sp={dist.get_world_size()}, {length}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


def _measured(subject: Subject, length: int, options: argparse.Namespace) -> list[Row]:
    def batches(seed: int) -> Batch:
        return subject.batch(seed, 1, length)

    torch.manual_seed(0)
    model = subject.build()
    peers = dict(_peers(model, options.peer))
    ours = dict(_ours(model, batches(0), options.form))
    sides = [*ours.values(), *peers.values()]
    sent = {name: side.sent().total() for name, side in ours.items()}
    start = time.perf_counter()
    _, before = measure(sides, batches, 0, 1)
    rounds = _of_rank_0(max(LEAST, round(options.seconds / (time.perf_counter() - start))))
    times, difference = measure(sides, batches, rounds, 0)
    of = dict(zip([*ours, *peers], times))
    settings = {
        "ranks": dist.get_world_size(),
        "length": length,
        "rounds": rounds,
        "loss_difference": max(before, difference),
        "load": os.getloadavg()[0],
    }
    return [
        Row(
            side=f"{'autopar' if name in ours else 'peer'} {name.removeprefix(PREFIX)}",
            ms=1e3 * statistics.median(of[name].wall),
            cpu_seconds=statistics.median(of[name].cpu),
            phases=of[name].phase_ms(),
            ratios=_ratios(of[name], {peer: of[peer] for peer in peers}) if name in ours else {},
            sent=(ours[name].sent().total() - sent[name]) // (rounds + 1) if name in ours else 0,
            compile_seconds=ours[name].compile_seconds if name in ours else 0.0,
            **settings,  # type: ignore[arg-type]
        )
        for name in of
    ]


PREFIX = "autopar "


def _ours(model: nn.Module, batch: Batch, forms: Sequence[str]) -> Iterator[tuple[str, Autopar]]:
    """By form; the hybrid needs groups of neighbours smaller than all, and one rank has no form."""
    ranks = dist.get_world_size()
    possible = [form for form in forms if form != "hybrid" or ranks > 2] if ranks > 1 else ["auto"]
    for form in possible:
        plan = autopar.Plan(attention=form)
        yield PREFIX + form, Autopar(copy.deepcopy(model), autopar.Mesh(sp=ranks), plan, batch, True)


def _peers(model: nn.Module, kinds: Sequence[str]) -> Iterator[tuple[str, Contender]]:
    for kind in kinds:
        if kind == "alone":
            yield kind, Alone(copy.deepcopy(model), True)
        elif dist.get_world_size() > 1:
            yield kind, HandWritten(copy.deepcopy(model), kind, True)


def _of_rank_0(number: int) -> int:
    found = torch.tensor(number)
    dist.broadcast(found, 0)
    return int(found)


def _ratios(ours: Times, peers: Mapping[str, Times]) -> dict[str, dict[str, Ratio]]:
    return {
        name: {"wall": Ratio.of(ours.wall, theirs.wall), "cpu": Ratio.of(ours.cpu, theirs.cpu)}
        for name, theirs in peers.items()
    }


# ---------------------------------------------------------------- the table


def _table(rows: Sequence[Row], peers: Sequence[str]) -> Table:
    """Ratios are ours / the peer's: of the clock, and of the processor time of all ranks together."""
    title = "a step: forward, backward, AdamW; fp32, gloo, one thread a process"
    table = Table("sp", "S", "side", title=title, title_justify="left")
    for name in ("ms", "cpu s", "f/b/o", *(f"/ {peer}: {of}" for peer in peers for of in ("clock", "cpu"))):
        table.add_column(name, justify="right")
    for name in ("sent MB", "loss", "rounds", "load"):
        table.add_column(name, justify="right")
    for row in rows:
        ratios = [str(row.ratios[peer][of]) if peer in row.ratios else "" for peer in peers for of in ("wall", "cpu")]
        table.add_row(
            str(row.ranks),
            str(row.length),
            row.side,
            f"{row.ms:.0f}",
            f"{row.cpu_seconds:.2f}",
            phases_text(row.phases),
            *ratios,
            f"{row.sent / 1e6:.1f}" if row.sent else "",
            f"{row.loss_difference:.0e}",
            str(row.rounds),
            f"{row.load:.1f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
