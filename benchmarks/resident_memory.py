"""What the memory table predicts for a step, beside what two real processes hold, for several models and meshes.

    python -m benchmarks.resident_memory                      all models on all their meshes
    python -m benchmarks.resident_memory --models our-gpt-256

Gloo, one thread a process, torch's AdamW, float32, rows of 128 tokens, eight in a step. Of the rank that is predicted
to hold most: between steps the bytes of the storages of all tensors that Python can see, beyond those before the model;
in a step the rise of resident memory, added to that. Each allocation of 16 kB or more is a mapping of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

import autopar
from autopar.memory.table import RankMemory, memory_of
from benchmarks.contenders import RATE
from benchmarks.launch import launched
from benchmarks.process_memory import EXACT, forget_most_resident, most_resident, of_tensors, resident
from benchmarks.subjects import VOCABULARY, hugging_face_llama, our_gpt, our_mixture, tokens_with_labels

MODULE = "benchmarks.resident_memory"
BATCH = tokens_with_labels(VOCABULARY, 0)
RANKS, SETTLED = 2, 3  # steps until programs are compiled and states are made
DENSE = ("dp=2", "dp=2 zero=3", "tp=2", "pp=2 microbatches=4")
MIXTURE = ("dp=2", "dp=2 zero=3", "tp=2", "ep=2")


@dataclass(frozen=True)
class Measured:
    """A model, and the meshes with plans on which it is measured."""

    build: Callable[[], nn.Module]
    choices: Sequence[str] = DENSE


MODELS = {
    "hf-llama-256": Measured(lambda: hugging_face_llama(256, 4)),
    "our-gpt-256": Measured(lambda: our_gpt(256, 4)),
    "hf-llama-tied-256": Measured(lambda: hugging_face_llama(256, 4, tied=True)),
    "our-moe-256": Measured(lambda: our_mixture(256, 4), MIXTURE),
}


@dataclass(frozen=True)
class Row:
    """Bytes of the rank that is predicted to hold most; ``peak``: in the step and while the optimizer runs."""

    model: str
    choices: str
    held: int
    held_predicted: int
    gradients: int
    gradients_predicted: int
    peak: int
    peak_predicted: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    if options.worker:
        _work(options.models[0], options.worker)
        return 0
    rows = [Row(**row) for name in options.models for row in launched(MODULE, RANKS, ["--models", name], EXACT)]
    if options.json:
        print(json.dumps([*map(asdict, rows)], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(_table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # this is a rank; rank 0 writes there
    return parser


def _work(name: str, found: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    every = MODELS[name].choices
    _measured(name, every[0])  # what is loaded, or remembered, on first use counts for no mesh
    rows = [_measured(name, choices) for choices in every]
    if dist.get_rank() == 0:
        found.write_text(json.dumps([*map(asdict, rows)]))
    dist.destroy_process_group()


def _read(choices: str) -> tuple[autopar.Mesh, autopar.Plan]:
    """``dp=2 zero=3``: the mesh, then the plan."""
    axes, *plan = choices.split()
    sizes = {name: int(size) for name, _, size in (choice.partition("=") for choice in plan)}
    return autopar.Mesh.parse(axes), autopar.Plan(**sizes)  # type: ignore[arg-type]


def _measured(name: str, choices: str) -> Row:
    mesh, plan = _read(choices)
    program = autopar.compile_program(MODELS[name].build(), mesh, plan, kwargs=BATCH)
    largest = memory_of(program, "adamw", timeline=False).largest
    every: list[Row | None] = [None] * RANKS
    dist.all_gather_object(every, _row(name, choices, largest))
    found = every[largest.first]
    assert found is not None
    return found


def _row(name: str, choices: str, predicted: RankMemory) -> Row:
    torch.manual_seed(0)
    mesh, plan = _read(choices)
    before = of_tensors()
    parallel = autopar.parallelize(MODELS[name].build(), mesh, plan, example_inputs=BATCH)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=RATE)
    for _ in range(SETTLED):
        parallel.train_step(**BATCH)
        optimizer.step()
        optimizer.zero_grad()
    held = of_tensors() - before
    parallel.train_step(**BATCH)
    gradients = of_tensors() - before - held
    optimizer.zero_grad()
    return Row(
        name,
        choices,
        held,
        sum(_lasting(predicted)),
        gradients,
        predicted.gradients,
        held + _rise(parallel, optimizer),
        predicted.peak,
    )


def _lasting(one: RankMemory) -> Iterator[int]:
    """What is held from step to step."""
    yield from (one.parameters, one.optimizer, one.at_peak["buffers"])


def _rise(parallel: autopar.ParallelModule, optimizer: torch.optim.Optimizer) -> int:
    """By how much a step and the update lift the resident memory of this process."""
    gc.collect()
    forget_most_resident()
    start = resident()
    parallel.train_step(**BATCH)
    optimizer.step()
    found = most_resident() - start
    optimizer.zero_grad()
    return found


def _table(rows: Sequence[Row]) -> Table:
    table = Table("model", "mesh, plan", title="the rank that holds most, two processes, AdamW, float32")
    for name in ("between steps", "predicted", "gradients", "predicted", "peak, MB", "predicted", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            row.choices,
            *(f"{size:,}" for size in (row.held, row.held_predicted, row.gradients, row.gradients_predicted)),
            *(f"{size / 1e6:.1f}" for size in (row.peak, row.peak_predicted)),
            f"{row.peak / row.peak_predicted:.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
