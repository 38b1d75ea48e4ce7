"""Activations of one rank with the sequence split: bytes at the peak x n / S, and the longest sequence that fits.

    python -m benchmarks.sequence_memory                                     S = 2k to 32k, n = 1, 2, 4 and 8
    python -m benchmarks.sequence_memory --svg docs/sequence_memory.svg      and the figure
    python -m benchmarks.sequence_memory --form ulysses --processes 0

Counted on the programs, on tensors without memory (``autopar.analysis.peak``), and up to ``--longest`` tokens measured
in gloo processes: what resident memory rises in forward and in backward, of the rank that has most. Parameters, inputs
and optimizer states are not among it; gradients, and the logits that the model returns, are.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import autopar
from autopar.analysis.peak import peak
from benchmarks.contenders import loss_of
from benchmarks.launch import launched
from benchmarks.process_memory import EXACT, forget_most_resident, most_resident, resident
from benchmarks.sequence_figure import Curve, Panel, figure, short
from benchmarks.subjects import SUBJECTS, Batch, Subject

MODULE = "benchmarks.sequence_memory"
LENGTHS = tuple(2048 * 2**power for power in range(5))
GRAIN = 128  # the longest sequence is a multiple of so many tokens a rank
CLOSE = 0.02


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank at the peak of forward and of backward, of ``length`` tokens over ``ranks``."""

    ranks: int
    length: int
    forward: int
    backward: int

    @property
    def most(self) -> int:
        return max(self.forward, self.backward)

    def a_token(self, of: int) -> float:
        """``of`` such bytes for each token of a rank's own: x n / S."""
        return of * self.ranks / self.length


Count = Callable[[int, int], Activations]  # of (ranks, length)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    subject = SUBJECTS[options.model]
    if options.worker:
        _work(subject, options)
        return 0
    warnings.filterwarnings("ignore")
    count = partial(counted, subject, options.form)
    found = [count(ranks, length) for ranks in options.ranks for length in options.length]
    measured = list(_measured(options))
    longest = _longest(count, options.fit, round(options.budget * 1e6), found[0])
    if options.svg:
        options.svg.write_text(_figure(options, found, measured, longest))
    if options.json:
        rows = {"counted": [*map(asdict, found)], "measured": [*map(asdict, measured)], "longest": longest}
        print(json.dumps(rows, indent=2))
    else:
        console = Console(width=None if sys.stdout.isatty() else 130)
        console.print(_table(f"{options.model}, {options.form}, float32", found, measured))
        console.print(_longest_table(options.budget, longest))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default="hf-llama-long")
    parser.add_argument("--form", choices=("ring", "ulysses", "gather", "hybrid", "auto"), default="ring")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--length", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--processes", type=int, default=4, help="measure up to that many")
    parser.add_argument("--longest", type=int, default=8192, help="measure up to that many tokens")
    parser.add_argument("--budget", type=float, default=1000, help="MB of activations for the longest sequence")
    parser.add_argument("--fit", type=int, default=8, help="the longest sequence of 1 to so many ranks")
    parser.add_argument("--svg", type=Path, help="write the figure there")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes there
    return parser


# ---------------------------------------------------------------- counted


def counted(subject: Subject, form: str, ranks: int, length: int) -> Activations:
    batch, plan = subject.batch(0, 1, length), _plan(form)
    program = autopar.compile_program(subject.build(), autopar.Mesh(sp=ranks), plan, kwargs=batch)
    assert isinstance(program, autopar.Program)
    found = peak(program)
    return Activations(ranks, length, found.forward, found.backward)


def _plan(form: str) -> autopar.Plan:
    return autopar.Plan(attention=form, check_numerics=False)


def _longest(count: Count, most_ranks: int, budget: int, known: Activations) -> dict[int, int]:
    """By the number of ranks; ``known`` says about how much a token takes."""

    def of(ranks: int) -> int:
        guess = round(budget / known.a_token(known.most) * ranks)
        return longest_that(lambda length: count(ranks, length).most <= budget, GRAIN * ranks, guess)

    return {ranks: of(ranks) for ranks in range(1, most_ranks + 1)}


def longest_that(fits: Callable[[int], bool], step: int, guess: int = 0) -> int:
    """The largest multiple of ``step`` that fits, 0 if none: by strides that double from a guess, then halving."""
    start = guess // step * step
    low, high, stride = start, start, step
    while low and not fits(low):
        low, high, stride = max(low - stride, 0), low, 2 * stride
    if low == start:
        high = start + step
        while fits(high):
            low, high, stride = high, high + 2 * stride, 2 * stride
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---------------------------------------------------------------- in processes


def _measured(options: argparse.Namespace) -> Iterator[Activations]:
    lengths = [length for length in options.length if length <= options.longest]
    given = ["--model", options.model, "--form", options.form, "--length", *lengths]
    for ranks in options.ranks:
        if lengths and ranks <= options.processes:
            yield from (Activations(**entry) for entry in launched(MODULE, ranks, given, EXACT))


def _work(subject: Subject, options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [_of_step(subject, options.form, length) for length in options.length]
    if dist.get_rank() == 0:
        options.worker.write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


def _of_step(subject: Subject, form: str, length: int) -> Activations:
    torch.manual_seed(0)
    ranks, batch = dist.get_world_size(), subject.batch(0, 1, length)
    parallel = autopar.parallelize(subject.build(), autopar.Mesh(sp=ranks), _plan(form), example_inputs=batch)
    _risen(parallel, batch)  # what is loaded on first use counts for no step
    found = torch.tensor(_risen(parallel, batch))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return Activations(ranks, length, int(found[0]), int(found[1]))


def _risen(parallel: autopar.ParallelModule, batch: Batch) -> tuple[int, int]:
    """Bytes by which resident memory rises at most in forward, and in backward from before forward."""
    gc.collect()
    forget_most_resident()
    start = resident()
    loss = loss_of(parallel(**batch))
    forward = most_resident() - start
    forget_most_resident()
    loss.backward()  # type: ignore[no-untyped-call]
    backward = most_resident() - start
    parallel.zero_grad()
    return forward, backward


# ---------------------------------------------------------------- tables and figure


def _table(title: str, found: Sequence[Activations], measured: Sequence[Activations]) -> Table:
    """Bytes a token are x n / S; a ratio is that to one rank's of the same length."""
    table = Table("n", "S", title=title, title_justify="left")
    for name in ("peak MB", "forward x n/S", "backward x n/S", "peak, of n = 1", "measured MB", "x n/S", "of n = 1"):
        table.add_column(name, justify="right")
    ones, of_one = ({row.length: row for row in rows if row.ranks == 1} for rows in (found, measured))
    real = {(row.ranks, row.length): row for row in measured}
    for row in found:
        cells = [f"{row.most / 1e6:.1f}", f"{row.a_token(row.forward):.1f}", f"{row.a_token(row.backward):.1f}"]
        cells.append(_ratio(row, ones))
        if (row.ranks, row.length) in real:
            other = real[row.ranks, row.length]
            cells += [f"{other.most / 1e6:.1f}", f"{other.a_token(other.most):.0f}", _ratio(other, of_one)]
        table.add_row(str(row.ranks), str(row.length), *cells)
    return table


def _ratio(row: Activations, ones: Mapping[int, Activations]) -> str:
    """Marked where it is more than ``CLOSE``."""
    if row.length not in ones:
        return ""
    one = ones[row.length]
    ratio = row.a_token(row.most) / one.a_token(one.most)
    return f"{ratio:.4f}" + ("" if abs(ratio - 1) <= CLOSE else " !")


def _longest_table(budget: float, longest: Mapping[int, int]) -> Table:
    table = Table("n", title=f"the longest sequence with {budget:g} MB of activations a rank", title_justify="left")
    for ranks in longest:
        table.add_column(str(ranks), justify="right")
    table.add_row("S", *map(str, longest.values()))
    table.add_row("/ n, of n = 1", *(f"{length / n / longest[1]:.3f}" for n, length in longest.items()))
    return table


def _figure(
    options: argparse.Namespace,
    found: Sequence[Activations],
    measured: Sequence[Activations],
    longest: Mapping[int, int],
) -> str:
    def of(rows: Sequence[Activations], ranks: int) -> dict[float, float]:
        return {row.length: row.most / 1e6 for row in rows if row.ranks == ranks}

    curves = [Curve(f"n = {n}", of(found, n), of(measured, n)) for n in options.ranks]
    fits = Curve("", {n: float(length) for n, length in longest.items()})
    ideal = Curve("n x", {n: float(n * longest[1]) for n in longest}, dashed=True)
    ticks = {float(length): short(length) for length in LENGTHS if length >= min(longest.values()) / 2}
    panels = [
        Panel(
            "MB at the peak of a rank (circles: in processes)",
            "tokens",
            curves,
            {10.0**p: f"{10**p}" for p in (1, 2, 3)},
        ),
        Panel(f"the longest sequence in {options.budget:g} MB", "ranks", [fits, ideal], ticks),
    ]
    return figure(panels, f"Activations with the sequence split: {options.model}, {options.form}, float32")


if __name__ == "__main__":
    sys.exit(main())
