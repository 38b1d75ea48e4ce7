"""What torch does to a part of a parallel module between its calls: casts, functional_call, prune on a pipeline."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import autopar
from autopar import Mesh, Plan
from autopar.errors import InvariantError
from tests.against_one_process import float64, whole
from tests.launch import run_ranks
from tests.selection import slow_but
from tests.weights.test_between_calls import batch, train


class Net(nn.Module):
    """The norm computes in a dtype of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x.to(self.up.weight.dtype)))
        h = self.norm(h.to(self.norm.weight.dtype)).to(self.down.weight.dtype)
        return self.down(h).square().mean()


def changed(axes: dict[str, int], plan: dict[str, Any]) -> list[float]:
    model = float64(Net)
    pair = (
        autopar.parallelize(copy.deepcopy(model), Mesh(**axes), Plan(timeout=30.0, check_numerics=False, **plan)),
        model,
    )
    losses = []
    for each in pair:
        found = train(each, 0)
        each.norm.float()
        found += train(each, 1)
        each.norm.double()
        found += train(each, 2)
        own = dict(each.named_parameters())
        found.append(torch.func.functional_call(each, own, (batch(3),)).detach())
        found += train(each.float(), 4)
        losses.append(found)
    others = {"up.bias": torch.zeros(6), "norm.bias": torch.zeros(6)}
    for outer, prefix in ((pair[0], ""), (nn.ModuleDict({"inner": pair[0]}), "inner.")):
        with pytest.raises(InvariantError, match=f"another tensor in the place of '{prefix}(up|norm).bias'"):
            torch.func.functional_call(outer, {prefix + name: one for name, one in others.items()}, (batch(0),))
    if "pp" in axes:
        with pytest.raises(InvariantError, match="(?s)prune of a Linear .* on pp.*Way out"):
            prune.l1_unstructured(pair[0].up, "weight", amount=0.5)
        with pytest.raises(InvariantError, match="(?s)parametrize of a Linear .* on pp.*Way out"):
            parametrize.register_parametrization(pair[0].down, "weight", nn.Identity())
    errors = [(whole(a) - whole(b)).abs().item() for a, b in zip(*losses)]
    return [errors[0], *(error / 1e6 for error in errors[1:3]), *(error / 1e7 for error in errors[3:])]


@pytest.mark.parametrize(
    ("axes", "plan"),
    slow_but([0], [({"dp": 2}, {"zero": 1}), ({"pp": 2}, {}), ({"tp": 2}, {}), ({"dp": 2}, {"zero": 3})]),
)
def test_parts_are_cast_and_replaced(axes: dict[str, int], plan: dict[str, Any]) -> None:
    for errors in run_ranks(changed, 2, axes, plan):
        assert max(errors) < 1e-13, errors
