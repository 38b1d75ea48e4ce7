"""What scripts do between the calls of a model: prune, assign, share, load a state of one device; as there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import autopar
from autopar import Mesh, Plan
from tests.against_one_process import difference, float64, whole
from tests.launch import run_ranks
from tests.selection import slow_but

Model = Any


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.router = nn.Linear(4, 2, bias=False)
        self.tied, self.again = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.again.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            y = y.index_add(0, rows, expert(x[rows]) * weights[rows].unsqueeze(1))
        return (self.down(torch.tanh(self.up(x))) + y + self.again(torch.tanh(self.tied(x)))).square().mean()


def batch(seed: int) -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def train(model: Model, *seeds: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for seed in seeds:
        loss = model(batch(seed))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def pruned(model: Model) -> list[Tensor]:
    """A parameter goes on under another name, beside a new buffer; then it is back."""
    prune.l1_unstructured(model.up, "weight", amount=0.4)
    losses = train(model, 1)
    prune.remove(model.up, "weight")
    return losses + train(model, 2)


def assigned(model: Model) -> list[Tensor]:
    """Tied parameters have one tensor then, and a stack of experts is another parameter."""
    torch.manual_seed(2)
    model.load_state_dict(Net().state_dict(), assign=True)
    return train(model, 3, 4)


def resumed(model: Model) -> list[Tensor]:
    """The state of an optimizer of one device, loaded after a step."""
    single = Net()
    others = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in (single, model)]
    for parameter in single.parameters():
        parameter.grad = torch.ones_like(parameter)
    others[0].step()
    model(batch(1)).backward()
    others[1].step()
    others[1].load_state_dict(others[0].state_dict())
    others[1].step()
    return train(model, 2)


def shared(model: Model) -> list[Tensor]:
    model.share_memory()
    return train(model, 5)


HABITS: tuple[Callable[[Model], list[Tensor]], ...] = (resumed, pruned, assigned, shared)


def errors(axes: dict[str, int], plan: dict[str, Any]) -> dict[str, float]:
    model = float64(Net)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(**axes), Plan(check_numerics=False, timeout=30.0, **plan))
    parallel.prepare(batch(0))
    found = {}
    for habit in HABITS[("ep" in axes) :]:  # an optimizer of one device has no stacks
        results = []
        for module in (parallel, reference):
            torch.manual_seed(1)
            results.append(train(module, 0) + habit(module))
        losses = max(difference(p, q) for p, q in zip(*results))
        wanted, states = reference.state_dict(), parallel.full_state_dict()
        assert set(wanted) == set(states)
        found[habit.__name__] = max(losses, *(difference(states[name], whole(wanted[name])) for name in wanted))
    return found


@pytest.mark.parametrize(
    ("axes", "plan"),
    slow_but(
        [0], [({"dp": 2}, {"zero": 3}), ({"dp": 1, "ep": 2}, {"zero": 3}), ({"tp": 2}, {}), ({"dp": 2}, {"zero": 1})]
    ),
)
def test_as_on_one_device(axes: dict[str, int], plan: dict[str, Any]) -> None:
    for found in run_ranks(errors, Mesh(**axes).world_size, axes, plan):
        assert max(found.values()) < 1e-12, found
