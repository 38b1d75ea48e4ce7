"""What users write to, in place, of what a model took and returned: a backward pass that needed it is refused.

And nothing but what they write to changes: not other outputs, buffers, parameters or inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import full_of
from tests.against_one_process import compare_gradients, float64, worst
from tests.launch import run_ranks
from tests.selection import slow_but

Given = dict[str, Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tokens = nn.Linear(4, 6), nn.Linear(6, 4), nn.Embedding(5, 4)

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.a(x.view(-1, 4) + self.tokens(t)))
        logits = self.b(hidden)
        best = logits.detach().argmax(-1)
        pairs = logits.view(-1, 2, 2)
        loss = logits.square().mean() + logits.gather(1, best[:, None]).mean() + (pairs * x.view(-1, 2, 2)).mean()
        return {"loss": loss, "logits": logits, "hidden": hidden, "best": best, "double": logits * 2}


def added(given: Given, x: Tensor) -> None:
    given["logits"] += 1


WRITES: dict[str, Callable[[Given, Tensor], Any]] = {
    "logits": lambda given, x: given["logits"].mul_(0.5),
    "logits ": added,
    "logits alone": lambda given, x: given.pop("logits").detach().view(-1).zero_(),
    "hidden": lambda given, x: given["hidden"].detach()[:, :2].zero_(),
    "best": lambda given, x: given["best"].zero_(),
    "x": lambda given, x: x.view(-1)[:2].mul_(2),
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5


def refusals(axes: dict[str, int], plan: dict[str, Any]) -> tuple[dict[str, str], float]:
    parallel, model = autopar.parallelize(float64(Net), Mesh(**axes), Plan(timeout=30.0, **plan)), float64(Net)
    said = {}
    for name, write in WRITES.items():
        x, t = batch()
        given = dict(parallel(x, t))
        if name == "x" or given[name.split()[0]] is not None:  # on a pipeline the last stage has them
            write(given, x)
        try:
            given["loss"].backward()
        except (RuntimeError, autopar.AutoparError) as problem:
            said[name] = str(problem)
    if "pp" not in axes:  # which runs backward once
        given = dict(parallel(*batch()))
        given["loss"].backward(retain_graph=True)
        given["logits"].zero_()
        with pytest.raises((RuntimeError, autopar.AutoparError), match="inplace operation"):
            given["loss"].backward()
    parallel.zero_grad()
    for each in (parallel, model):
        given = dict(each(*batch()))
        given["loss"] *= 2
        if given["double"] is not None:
            given["double"].zero_()
        given["loss"].backward()
    error = 0.0 if "pp" in axes else worst(compare_gradients(parallel, model))[0]
    return said, error


@pytest.mark.parametrize(
    ("axes", "plan"),
    slow_but(
        [0], [({"dp": 2}, {}), ({}, {}), ({"tp": 2}, {}), ({"dp": 2}, {"zero": 3}), ({"pp": 2}, {"microbatches": 1})]
    ),
)
def test_backward_is_refused(axes: dict[str, int], plan: dict[str, Any]) -> None:
    for said, error in run_ranks(refusals, Mesh(**axes).world_size, axes, plan):
        assert {name: text for name, text in said.items() if "inplace operation" not in text} == {}
        assert said.keys() == (WRITES.keys() if "pp" not in axes else {"x"})  # on a pipeline outputs are copies
        assert error < 1e-12


class Returning(nn.Module):
    """Each output in memory of its own, but the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("state", torch.arange(4.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.a(x)
        found = {"copy": y.clone(), "once": y.detach() * 1, "sum": x + 1, "again": x + 1, "input": x.clone()}
        found |= {"state": self.state.clone(), "same": self.state + 0, "scale": self.scale.detach().clone()}
        found |= {"range": torch.arange(4.0), "range again": torch.arange(4.0), "one": x * 1.0}
        return found | {"y": y, "view": y.view(-1, 2)}


def changed(axes: dict[str, int]) -> list[tuple[str, set[str]]]:
    """Of each output that is written to, what else has changed by it."""
    parallel = autopar.parallelize(float64(Returning), Mesh(**axes), Plan(timeout=30.0))

    def numbers(given: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        held = {"of input": x, "of state": parallel.state, "of scale": parallel.scale}
        return {name: full_of(each).detach().clone() for name, each in (given | held).items()}

    found = []
    with torch.no_grad():
        names = list(parallel(batch()[0]))
    for learns in (False, True):
        for name in names[:-2]:
            x = batch()[0]
            with torch.set_grad_enabled(learns):
                given = parallel(x)
            before = numbers(given, x)
            with torch.no_grad():
                given[name].add_(7)
            after = numbers(given, x)
            found.append((name, {other for other in after if not torch.equal(after[other], before[other])}))
    return found


@pytest.mark.parametrize("axes", slow_but([0], [{}, {"dp": 2}, {"tp": 2}]))
def test_nothing_else_changes(axes: dict[str, int]) -> None:
    for found in run_ranks(changed, Mesh(**axes).world_size, axes):
        assert all(others == {name} for name, others in found), found
