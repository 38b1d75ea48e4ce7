"""What the parallel module and its generated code cost on one rank, beside the eager model: CPU microseconds a step.

    python -m benchmarks.overhead

Tiny models, so that nothing but overhead is seen; thread time, so that other programs on the machine do not matter.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autopar
from autopar.models import bert, gpt, llama, mlp

ROUNDS, CALLS = 20, 20


def microseconds(function: Callable[[], Any]) -> float:
    """The fastest of ROUNDS rounds."""
    function()
    fastest = float("inf")
    for _ in range(ROUNDS):
        started = time.thread_time()
        for _ in range(CALLS):
            function()
        fastest = min(fastest, time.thread_time() - started)
    return fastest / CALLS * 1e6


def measured(model: nn.Module, batch: dict[str, Any]) -> dict[str, float]:
    parameters = list(model.parameters())

    def step() -> None:
        model(**batch)["loss"].backward()
        for parameter in parameters:
            parameter.grad = None

    def infer() -> None:
        with torch.no_grad():
            model(**batch)

    calls = {"forward": lambda: model(**batch), "step": step, "inference": infer}
    return {kind: microseconds(call) for kind, call in calls.items()}


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':8}" + "".join(f"{kind:>32}" for kind in ("forward", "forward + backward", "inference")))
    for module in (mlp, gpt, llama, bert):
        torch.manual_seed(0)
        model: Any = module.build()
        batch = module.example_batch(model.config, 2)
        parallel = autopar.parallelize(copy.deepcopy(model), autopar.Mesh(), example_inputs=batch)
        eager, ours = measured(model, batch), measured(parallel, batch)
        cells = [f"{ours[kind]:8.0f} : {eager[kind]:6.0f} us = {ours[kind] / eager[kind]:4.2f}" for kind in eager]
        print(f"{module.__name__.split('.')[-1]:8}" + "".join(f"{cell:>32}" for cell in cells))


if __name__ == "__main__":
    main()
