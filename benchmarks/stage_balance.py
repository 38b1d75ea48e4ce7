"""How evenly pipeline stages are cut on models of real size, and how long the cut takes.

    python -m benchmarks.stage_balance                  llama 70B, gpt 175B, t5 large, t5 11B, mixtral into 4, 8, 16
    python -m benchmarks.stage_balance --models gpt:gpt_175b --stages 4 --json

Each model is traced on the meta device at the size of one microbatch, one row of its full context, in bfloat16. The
optimum is that of dynamic programming over every place of the trace (exact for a sequence of calls), without a limit on
the bytes that cross.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from autopar.compiler import split_program
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.pipeline.assignment import assign_stages
from autopar.pipeline.interval_costs import StageGraph
from autopar.pipeline.intervals import least_worst
from autopar.pipeline.stage_table import describe_stages
from autopar.plan import Plan
from autopar.zoo.named import named_model

MODELS = ("llama:llama_70b", "gpt:gpt_175b", "t5:t5_large", "t5:t5_11b", "moe:mixtral_8x7b")
STAGES = (4, 8, 16)


@dataclass(frozen=True)
class Balance:
    """``over_mean``, ``over_optimum``: time of the slowest stage; ``optimum_over_mean``: that of the best cut at any
    place, over the same mean; ``sent_mb``: over all cuts, forward, for one microbatch; ``seconds``: of the clock, to
    assign the stages."""

    model: str
    calls: int
    stages: int
    over_mean: float
    optimum_over_mean: float
    over_optimum: float
    sent_mb: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stage_balance", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--layers", type=int, help="of each model, in place of its own")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tables", action="store_true", help="what each stage holds, too")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    found = []
    for name in options.models:
        program = program_of(name, options.layers)
        for count in options.stages:
            found.append(measure(name, program, count))
            if not options.json:
                print(_row(found[-1]), flush=True)
            if options.tables:
                print(describe_stages(program, assign_stages(program, count)))
    if options.json:
        print(json.dumps([asdict(entry) for entry in found], indent=2))
    return 0


def program_of(name: str, layers: int | None) -> Program:
    example = named_model(f"models.{name}", {"layers": layers} if layers else None, batch=1)
    model = example.model.to(torch.bfloat16)
    return split_program(model, Mesh(), Plan(check_numerics=False), (), example.batch)


def measure(name: str, program: Program, count: int) -> Balance:
    start = time.perf_counter()
    assignment = assign_stages(program, count)
    seconds = time.perf_counter() - start
    table = describe_stages(program, assignment)
    optimum = optimum_of(program, count)
    slowest = max(stage.seconds for stage in table.stages)
    sent = sum(stage.sent_bytes for stage in table.stages) / 1e6
    best_over_mean, over_optimum = table.balance * optimum / slowest, slowest / optimum
    calls = len(assignment.stage_of)
    return Balance(name, calls, count, table.balance, best_over_mean, over_optimum, sent, round(seconds, 2))


def optimum_of(program: Program, count: int) -> float:
    """The least seconds that the slowest of ``count`` stages can take."""
    graph = StageGraph(program)
    tables = graph.tables([0, *graph.places_to_cut, len(graph)])
    return least_worst([tables.seconds] * count)


def _row(found: Balance) -> str:
    return (
        f"| {found.model.partition(':')[2]} | {found.calls} | {found.stages} | {found.over_mean:.3f} | "
        f"{found.optimum_over_mean:.3f} | {found.over_optimum:.3f} | {found.sent_mb:.0f} | {found.seconds:.2f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
