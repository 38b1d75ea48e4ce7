"""What the parallel module and its generated code cost on one rank, beside the eager model: CPU microseconds a step.

    python -m benchmarks.overhead
    python -m benchmarks.overhead mlp bert --rounds 200

Tiny models, so that nothing but overhead is seen; thread time, so that other programs on the machine do not matter. The
two take their calls in turns, so that a machine that is slower for a while is so for both; the ratio is the median of
the pairs, with the middle half of them.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

import autopar
from autopar.models import bert, gpt, llama, mlp
from benchmarks.paired import Ratio

CALLS = 10
MODELS: dict[str, ModuleType] = {"mlp": mlp, "gpt": gpt, "llama": llama, "bert": bert}


def microseconds(function: Callable[[], Any]) -> float:
    started = time.thread_time()
    for _ in range(CALLS):
        function()
    return (time.thread_time() - started) / CALLS * 1e6


def calls(model: nn.Module, batch: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    parameters = list(model.parameters())

    def step() -> None:
        model(**batch)["loss"].backward()
        for parameter in parameters:
            parameter.grad = None

    def infer() -> None:
        with torch.no_grad():
            model(**batch)

    return {"forward": lambda: model(**batch), "forward + backward": step, "inference": infer}


def compared(module: ModuleType, rounds: int) -> dict[str, str]:
    """Words for each kind of call: microseconds of both, and their ratio."""
    torch.manual_seed(0)
    model: Any = module.build()
    batch = module.example_batch(model.config, 2)
    parallel = autopar.parallelize(copy.deepcopy(model), autopar.Mesh(), example_inputs=batch)
    cells, eager = {}, calls(model, batch)
    for kind, call in calls(parallel, batch).items():
        microseconds(call), microseconds(eager[kind])
        ours, theirs = zip(*((microseconds(call), microseconds(eager[kind])) for _ in range(rounds)))
        ratio = Ratio.of(ours, theirs)
        cells[kind] = f"{statistics.median(ours):.0f} : {statistics.median(theirs):.0f} us = {ratio}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=str(__doc__).splitlines()[0])
    parser.add_argument("model", nargs="*", metavar="MODEL", help=" ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.model or MODELS:
        cells = compared(MODELS[name], given.rounds)
        print(f"{name:8}" + "".join(f"{kind} {cell:36}" for kind, cell in cells.items()))
    print("load", *(f"{one:.1f}" for one in os.getloadavg()))


if __name__ == "__main__":
    main()
