"""Outputs beside the loss: a backward pass from one is refused by its name, and never left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import full_of
from autopar.errors import InvariantError, RanksDifferError
from tests.against_one_process import compare_gradients, float64, worst
from tests.launch import run_ranks
from tests.selection import slow_but


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.b(torch.tanh(self.a(x)))
        found = {"logits": logits, "best": logits.argmax(-1)}
        return found if y is None else {"loss": nn.functional.cross_entropy(logits, y), **found}


def some_rank_uses_it() -> str:
    """A gradient that is zero on one rank and not on the other."""
    model = autopar.parallelize(float64(Net), Mesh(dp=2), Plan(timeout=30.0))
    found = model(torch.ones(4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
    try:
        (found["loss"] + full_of(found["logits"])[:1].sum()).backward()
    except InvariantError as problem:
        return str(problem)
    return ""


def test_all_ranks_say_so() -> None:
    assert all("starts at output 'logits' beside the loss" in said for said in run_ranks(some_rank_uses_it, 2))


def go_backward(axes: dict[str, int]) -> float:
    model, reference = float64(Net), float64(Net)
    parallel = autopar.parallelize(model, Mesh(**axes), Plan(timeout=30.0))
    torch.manual_seed(3)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, -100, -100, 1])
    found: dict[str, Any] = parallel(x, y)
    if found["logits"] is not None:  # on a pipeline one stage has it
        assert found["logits"].requires_grad and not found["best"].requires_grad
        with pytest.raises(InvariantError, match="starts at output 'logits' beside the loss"):
            (found["loss"].detach() + full_of(found["logits"]).square().mean()).backward()
        for ask in (torch.autograd.grad, lambda loss, inputs: loss.backward(inputs=inputs)) if "pp" not in axes else ():
            both = found["loss"] + full_of(found["logits"]).square().mean()
            with pytest.raises(InvariantError, match="starts at output 'logits' beside the loss"):
                ask(both, [each for each in parallel.parameters() if each.requires_grad][:1])
            found = parallel(x, y)
    watched: list[Callable[[Tensor], Any]] = [Tensor.retain_grad, lambda logits: logits.register_hook(torch.neg)]
    for watch in watched:
        if found["logits"] is not None:  # on a pipeline the last stage has it, and the others hear of it
            watch(found["logits"])
        with pytest.raises((InvariantError, RanksDifferError), match="output 'logits' beside the loss .* has "):
            found["loss"].backward()
        found = parallel(x, y)
    assert all(parameter.grad is None for parameter in parallel.parameters())
    if found["logits"] is not None:
        (found["logits"].detach() * 2).sum()
    (found["loss"] if "pp" in axes else found["loss"] + 0 * full_of(found["logits"]).square().sum()).backward()
    with torch.no_grad():
        again = parallel(x, y)["logits"]
        assert again is None or not again.requires_grad
    reference(x, y)["loss"].backward()
    error = 0.0 if "pp" in axes else worst(compare_gradients(parallel, reference))[0]
    if "pp" not in axes:  # the way out: all losses of the outputs
        for module in (parallel, reference):
            module.zero_grad()
            logits = full_of(module(x)["logits"])
            (nn.functional.cross_entropy(logits, y) + 0.5 * logits.square().mean()).backward()
        error = max(error, worst(compare_gradients(parallel, reference))[0])
    return error


@pytest.mark.parametrize("axes", slow_but([0], [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 1}]))
def test_it_is_refused(axes: dict[str, int]) -> None:
    for error in run_ranks(go_backward, Mesh(**axes).world_size, axes):
        assert error < 1e-12
