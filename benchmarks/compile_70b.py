"""Seconds and memory that compiling Llama-70B for dp=8 x tp=8 takes, at several depths.

    python -m benchmarks.compile_70b                    8, 40 and 80 layers, a fresh process each
    python -m benchmarks.compile_70b --layers 80 --mesh dp=8,tp=8 --json
    python -m benchmarks.compile_70b --layers 80 --mesh pp=16,dp=128,tp=8    16,384 ranks

The model is Hugging Face's ``LlamaForCausalLM`` at its real widths in bfloat16 on the meta device: no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from autopar.analysis.footprint import held
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.plan import Plan

LAYERS = (8, 40, 80)
LENGTH = 4096
ROWS_PER_RANK = 1  # of each microbatch
MICROBATCHES = 16  # on a mesh with pp


@dataclass
class Compilation:
    """Of one depth: processor seconds of each step in order (there is one thread), seconds of the clock in all, and the
    most memory held, MB, of which ``baseline_mb`` before any compiling. Nodes are those of all stages; lines are those
    of one rank, as is ``parameter_mb``."""

    layers: int
    mesh: str
    seconds: dict[str, float] = field(default_factory=dict)
    clock_seconds: float = 0.0
    baseline_mb: float = 0.0
    peak_mb: float = 0.0
    forward_nodes: int = 0
    backward_nodes: int = 0
    emitted_lines: int = 0
    parameter_mb: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_70b", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--mesh", default="dp=8,tp=8")
    parser.add_argument("--sequence", default="none", choices=("none", "megatron"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # compile here, print JSON
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(asdict(_compiled(options.layers[0], options.mesh, options.sequence))))
        return 0
    found = [_apart(layers, options) for layers in options.layers]
    if options.json:
        print(json.dumps([asdict(entry) for entry in found], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(
            table_of(found, f"Llama-70B widths, HF LlamaForCausalLM on meta, {found[0].mesh}: processor seconds")
        )
    return 0


def _apart(layers: int, options: argparse.Namespace) -> Compilation:
    """In a process of its own, so that its peak of memory is its own too."""
    command = [sys.executable, "-m", "benchmarks.compile_70b", "--worker", "--layers", str(layers)]
    command += ["--mesh", options.mesh, "--sequence", options.sequence]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return Compilation(**json.loads(done.stdout.splitlines()[-1]))


def _compiled(layers: int, mesh: str, sequence: str) -> Compilation:
    named = Mesh.parse(mesh)
    microbatches = MICROBATCHES if named.size("pp") > 1 else 1
    rows = microbatches * ROWS_PER_RANK * named.size("dp")
    plan = Plan(sequence=sequence, microbatches=microbatches)
    return compilation(llama_70b(layers), batch_of(rows, LENGTH), layers, named, plan)


def compilation(model: nn.Module, batch: dict[str, Tensor], layers: int, mesh: Mesh, plan: Plan) -> Compilation:
    """Compile ``model`` in this process, which has compiled nothing yet, step by step."""
    from autopar.frontend.trace import trace
    from autopar.ir.collection import no_collection
    from autopar.ir.graph_pass import Phase, run_phases
    from autopar.passes import COMPILER

    warnings.filterwarnings("ignore")
    found = Compilation(layers, str(mesh), baseline_mb=_peak_mb())
    start, run = time.perf_counter(), Phase.run

    def timed(phase: Phase, step: Any, program: AnyProgram, **how: Any) -> Any:
        return _timed(found, step.name, partial(run, phase, step, program, **how))

    with no_collection(), mock.patch.object(Phase, "run", timed):  # as in compile_program
        program: AnyProgram = _timed(found, "trace", lambda: trace(model, (), batch, mesh, plan))
        program = run_phases(program, COMPILER, since=COMPILER[0].passes[0].name)
    code = _timed(found, "emit", lambda: _emitted(program))
    found.clock_seconds, found.peak_mb = time.perf_counter() - start, _peak_mb()
    for part in program.parts:
        assert part.required_role.backward is not None
        found.forward_nodes += len(part.required_role.forward.nodes)
        found.backward_nodes += len(part.required_role.backward.nodes)
    found.emitted_lines, found.parameter_mb = code.count("\n"), held(program).rank / 1e6
    return found


def _emitted(program: AnyProgram) -> str:
    """The source of the last rank, compiled to bytecode as well: what a rank does before its first step."""
    code = program.rank(program.mesh.world_size - 1).code
    compile(code, "<rank>", "exec")
    return code


def _timed(found: Compilation, name: str, step: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = step()
    found.seconds[name] = round(time.process_time() - start, 3)
    return result


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def llama_70b(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.train()


def batch_of(rows: int, length: int) -> dict[str, Tensor]:
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens.clone()}


def table_of(found: Sequence[Compilation], title: str) -> Table:
    """A column for each depth."""
    table = Table("layers", title=title, title_justify="left")
    columns = [str(entry.layers) for entry in found]
    growth = len(found) > 1
    if growth:
        columns.append(f"x from {found[0].layers} to {found[-1].layers}")
    for column in columns:
        table.add_column(column, justify="right")

    def row(name: str, values: Sequence[float], form: str) -> None:
        last = [f"{values[-1] / values[0]:.1f}"] if growth and values[0] > 0 else []
        table.add_row(name, *(form.format(entry) for entry in values), *last)

    for name in found[0].seconds:
        row(name, [entry.seconds[name] for entry in found], "{:.2f}")
    table.add_section()
    row("total", [entry.total for entry in found], "{:.1f}")
    row("by the clock", [entry.clock_seconds for entry in found], "{:.1f}")
    row("peak MB", [entry.peak_mb for entry in found], "{:.0f}")
    row("of it before compiling", [entry.baseline_mb for entry in found], "{:.0f}")
    row("forward nodes", [entry.forward_nodes for entry in found], "{:.0f}")
    row("backward nodes", [entry.backward_nodes for entry in found], "{:.0f}")
    row("emitted lines", [entry.emitted_lines for entry in found], "{:.0f}")
    row("MB of parameters of a rank", [entry.parameter_mb for entry in found], "{:.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
