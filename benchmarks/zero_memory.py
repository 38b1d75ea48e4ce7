"""Parameters, gradients, optimizer states and activations of one rank with ZeRO, beside the formulas.

    python -m benchmarks.zero_memory                                 N = 1, 2, 4 and 8, zero 0 to 3
    python -m benchmarks.zero_memory --svg docs/zero_memory.svg      and the figure

Each is read off the programs (any N, no processes) and, for N up to 4, measured in gloo processes: bytes of the
distinct storages of all tensors alive. AdamW, float32. The formulas are those of Rajbhandari et al. 2020, ZeRO, figure
1: with P, G, O of the whole model a rank holds P + G + O, P + G + O/N, P + (G + O)/N, (P + G + O)/N; and a N-th of the
activations that forward keeps for backward. Gradients are those that are held from batch to batch while they
accumulate; with ``zero=1`` a step of one batch holds less (column "G, 1 batch"): they are scattered at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn

import autopar
from autopar.analysis.footprint import held
from autopar.autodiff.hoist import without_gathers
from autopar.ir.node import output_node, value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.runtime.rank_graphs import PARTIAL, model_graphs
from autopar.simulate import simulate
from autopar.simulator.lockstep import Lockstep, Ranks
from autopar.simulator.parts import rank_inputs
from benchmarks.contenders import RATE, loss_of
from benchmarks.launch import launched
from benchmarks.process_memory import EXACT, allocated, forget_most_resident, most_resident, of_tensors, resident
from benchmarks.subjects import SUBJECTS, Batch, Subject
from benchmarks.zero_figure import Bar, figure

MODULE = "benchmarks.zero_memory"
STAGES = range(4)
CLOSE = 0.05


@dataclass(frozen=True)
class Held:
    """Bytes of one rank. ``activations``: what forward keeps for backward; ``peak``: the most in forward and backward,
    without optimizer states; ``once``: gradients after a step of a single batch."""

    ranks: int
    zero: int
    parameters: int
    gradients: int
    states: int
    activations: int
    peak: int
    once: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.states


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    subject = SUBJECTS[options.model]
    if options.worker:
        _work(subject, options.worker)
        return 0
    warnings.filterwarnings("ignore")
    simulated = [_simulated(subject, ranks, zero) for ranks in options.ranks for zero in STAGES]
    processes = [ranks for ranks in options.ranks if ranks <= options.processes]
    measured = [Held(**entry) for n in processes for entry in launched(MODULE, n, ["--model", options.model], EXACT)]
    whole = sum(parameter.nbytes for parameter in subject.build().parameters())
    if options.svg:
        options.svg.write_text(_figure(subject, whole, simulated, measured))
    if options.json:
        print(json.dumps({"read": [*map(asdict, simulated)], "measured": [*map(asdict, measured)]}, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(_table(whole, simulated, measured))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default="hf-llama-256")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--processes", type=int, default=4, help="measure up to that many")
    parser.add_argument("--svg", type=Path, help="write the figure there")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes there
    return parser


def formula(whole: int, ranks: int, zero: int) -> tuple[float, float, float]:
    """(parameters, gradients, optimizer states) of one rank of a model with ``whole`` bytes of parameters."""
    parts = [whole, whole, 2 * whole]
    return tuple(size / ranks if zero > 2 - place else size for place, size in enumerate(parts))  # type: ignore[return-value]


# ---------------------------------------------------------------- read off the program


def _simulated(subject: Subject, ranks: int, zero: int) -> Held:
    """Of rank 0, all ranks run in this process; AdamW's two moments are as large as what it is handed."""
    torch.manual_seed(0)
    batch, plan = subject.batch(0), autopar.Plan(zero=zero)
    model = subject.build()
    program = autopar.compile_program(model, autopar.Mesh(dp=ranks), plan, kwargs=batch)
    tensors = {name: tensor.detach() for name, tensor in _named(model)}
    peak = max(simulate(program, tensors, kwargs=batch).peak_bytes)
    role = program.required_role
    assert role.backward is not None
    parameters, activations = _kept(program, rank_inputs(program, tensors, (), batch, 0))
    waiting = model_graphs(program).rare.get(PARTIAL)
    part = held(program).rank
    return Held(
        ranks=ranks,
        zero=zero,
        parameters=parameters,
        gradients=_returned(program, waiting or role.backward),
        states=2 * part,
        activations=activations,
        peak=peak,
        once=_returned(program, role.backward),
    )


def _kept(program: Program, inputs: list[Ranks]) -> tuple[int, int]:
    """Bytes of the parameters, whole ones that stay included, and of what forward keeps for backward."""
    role = program.required_role
    places = {node.name: place for place, (node, _) in enumerate(program.placeholders(*InputKind))}
    parameters = {node.name for node, _ in program.placeholders(InputKind.PARAMETER)}
    gathering = without_gathers(role.forward, parameters) if program.plan.zero in (1, 2) else None
    own, forward, whole = {name: inputs[places[name]] for name in parameters}, role.forward, list[Ranks]()
    if gathering is not None:
        forward = gathering.rest
        whole = Lockstep(program.mesh).run(gathering.graph, [own[name] for name in gathering.parameters])
        for name, _ in filter(None, gathering.owners):
            del own[name]  # its part lies within the whole one
    there = _storages([*own.values(), *whole])
    everything = [*inputs, *whole]
    saved = Lockstep(program.mesh).run(forward, everything.copy())[len(program.outputs) :]
    kept = _storages(saved)
    for known in _storages(everything):
        kept.pop(known, None)
    return sum(there.values()), sum(kept.values())


def _storages(values: Iterable[Ranks]) -> dict[int, int]:
    """Of rank 0: address -> bytes."""
    storages = [ranks[0].untyped_storage() for ranks in values]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _returned(program: Program, graph: fx.Graph) -> int:
    kinds = [value(node) for node in output_node(graph).args[0]]  # type: ignore[union-attr, arg-type]
    return sum(math.prod(kind.layout.local_shape(program.mesh)) * kind.dtype.itemsize for kind in kinds)


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


# ---------------------------------------------------------------- in processes


def _work(subject: Subject, found: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    _measured(subject, 0)  # what is loaded, or remembered, on first use counts for no stage
    rows = [asdict(_measured(subject, zero)) for zero in STAGES]
    if dist.get_rank() == 0:
        found.write_text(json.dumps(rows))
    dist.destroy_process_group()


def _measured(subject: Subject, zero: int) -> Held:
    torch.manual_seed(0)
    ranks, batch = dist.get_world_size(), subject.batch(0)
    before = of_tensors()
    plan = autopar.Plan(zero=zero)
    parallel = autopar.parallelize(subject.build(), autopar.Mesh(dp=ranks), plan, example_inputs=batch)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=RATE)
    for _ in range(2):  # programs are compiled, whole parameters gathered
        parallel.train_step(**batch)
        optimizer.zero_grad()
    parameters = of_tensors() - before
    with parallel.no_sync():
        parallel.train_step(**batch)
    gradients = of_tensors() - before - parameters
    parallel.train_step(**batch)
    once = of_tensors() - before - parameters
    optimizer.step()
    states = of_tensors() - before - parameters - once
    optimizer.zero_grad()
    activations, added = _step(parallel, batch)
    return Held(ranks, zero, parameters, gradients, states, activations, parameters + added, once)


def _step(parallel: autopar.ParallelModule, batch: Batch) -> tuple[int, int]:
    """Bytes that forward leaves behind, and the most that forward and backward add."""
    parallel.train_step(**batch)
    parallel.zero_grad()
    gc.collect()
    forget_most_resident()
    start, held_before = resident(), allocated()
    loss = loss_of(parallel(**batch))
    kept = allocated() - held_before
    loss.backward()  # type: ignore[no-untyped-call]
    added = most_resident() - start
    parallel.zero_grad()
    return kept, added


# ---------------------------------------------------------------- table and figure


def _table(whole: int, simulated: Sequence[Held], measured: Sequence[Held]) -> Table:
    """MB; a ratio is that of the sum to the formula's."""
    title = f"MB of one rank, {whole / 1e6:.2f} MB of parameters, AdamW, float32"
    table = Table("N", "zero", "", title=title, title_justify="left")
    for name in ("P", "G", "O", "sum", "formula", "ratio", "G, 1 batch", "activations", "of N = 1", "peak"):
        table.add_column(name, justify="right")
    ones = {"read": simulated[0], "measured": (measured or simulated)[0]}
    for entry in simulated:
        same = [other for other in measured if (other.ranks, other.zero) == (entry.ranks, entry.zero)]
        for name, row in [("read", entry), *(("measured", other) for other in same)]:
            expected = sum(formula(whole, row.ranks, row.zero))
            sizes = (row.parameters, row.gradients, row.states, row.total, expected)
            ratio = row.total / expected
            kept = row.activations * row.ranks / ones[name].activations
            table.add_row(
                str(row.ranks),
                str(row.zero),
                name,
                *(f"{size / 1e6:.2f}" for size in sizes),
                f"{ratio:.3f}" + ("" if abs(ratio - 1) <= CLOSE else " !"),
                f"{row.once / 1e6:.2f}",
                f"{row.activations / 1e6:.2f}",
                f"1/{row.ranks} x {kept:.3f}",
                f"{row.peak / 1e6:.2f}",
            )
    return table


def _figure(subject: Subject, whole: int, simulated: Sequence[Held], measured: Sequence[Held]) -> str:
    marks = {(row.zero, row.ranks): row.total + row.activations for row in measured}
    kept = simulated[0].activations
    bars = [
        Bar(
            group=f"zero={row.zero}",
            name=f"N = {row.ranks}",
            parts=(row.parameters, row.gradients, row.states, row.activations),
            formula=sum(formula(whole, row.ranks, row.zero)) + kept / row.ranks,
            measured=marks.get((row.zero, row.ranks)),
        )
        for row in sorted(simulated, key=lambda row: (row.zero, row.ranks))
    ]
    return figure(
        bars,
        ("parameters", "gradients", "optimizer states", "activations"),
        f"Memory of one rank: {subject.name}, AdamW, float32",
    )


if __name__ == "__main__":
    sys.exit(main())
