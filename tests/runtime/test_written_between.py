"""A parameter that is written into between forward and backward is refused, as on one device.

And what else may be around a call of a parallel module: torch's checkpoint, transforms of torch.func.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import full_of
from autopar.errors import InvariantError, RanksDifferError
from autopar.module import ParallelModule
from tests.launch import run_ranks
from tests.selection import slow_but


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).square().mean()


def pair(axes: dict[str, int], plan: dict[str, Any]) -> tuple[ParallelModule, nn.Module]:
    torch.manual_seed(0)
    model = Net().double()
    return autopar.parallelize(deepcopy(model), Mesh(**axes), Plan(timeout=30.0, **plan)), model


def batch(seed: int) -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "b.weight":
                parameter.mul_(2)


def by_optimizer(model: nn.Module) -> None:
    torch.optim.Adam(model.parameters(), fused=True).step()


def bias(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "b.bias":
                parameter.mul_(2)


def written(axes: dict[str, int], plan: dict[str, Any]) -> list[float]:
    for write in (by_optimizer, by_hand) if "pp" not in axes else (by_optimizer,):  # which torch does not see itself
        parallel = pair(axes, plan)[0]
        parallel(batch(0)).backward()
        losses = [parallel(batch(seed)) for seed in (1, 2)]
        losses[1].backward()
        write(parallel)
        with pytest.raises((InvariantError, RanksDifferError), match="written into between .*inplace operation"):
            losses[0].backward()
    parallel, model = pair(axes, plan)
    for each in (parallel, model):
        loss = each(batch(1))
        bias(each)
        loss.backward()
        by_hand(each)
        each(batch(2)).backward()
    wanted = dict(model.named_parameters())
    grads = [(p.grad, wanted[name].grad) for name, p in parallel.named_parameters()]
    return [(full_of(found) - grad).abs().max().item() for found, grad in grads if found is not None]


@pytest.mark.parametrize(
    ("axes", "plan"),
    slow_but([0], [({}, {}), ({"dp": 2}, {"zero": 3}), ({"tp": 2}, {}), ({"pp": 2}, {})]),
)
def test_a_parameter_written_into(axes: dict[str, int], plan: dict[str, Any]) -> None:
    for errors in run_ranks(written, Mesh(**axes).world_size, axes, plan):
        assert max(errors, default=0.0) < 1e-12


def part(parameter: Any) -> Tensor:
    found: Tensor = (parameter.to_local() if hasattr(parameter, "to_local") else parameter).data
    return found


def past_dtensors(axes: dict[str, int], plan: dict[str, Any]) -> list[float]:
    """Between calls what is written is used; after a forward pass it is refused where the old numbers were."""
    parallel, model = pair(axes, plan)
    errors = []
    for seed in range(3):
        losses = []
        for each in (parallel, model):
            with torch.no_grad():
                losses.append(each(batch(seed)))
            part(each.b.weight).mul_(1.5)
            losses[-1] += each(batch(seed))
            part(each.a.weight).mul_(1.5)
        errors.append(abs(float(losses[0] - losses[1])))
    for again in (False, True):
        loss = parallel(batch(1))
        if again:
            parallel(batch(2)).backward()
        part(parallel.b.weight).mul_(2)
        with pytest.raises(InvariantError, match="'b.weight' .*written into between"):
            loss.backward()
    return errors


@pytest.mark.parametrize(("plan"), slow_but([0], [{}, {"bucket_mb": 0}]))
def test_a_part_written_into(plan: dict[str, Any]) -> None:
    for errors in run_ranks(past_dtensors, 2, {"dp": 2}, {"zero": 1, **plan}):
        assert max(errors) < 1e-12


def frozen(plan: dict[str, Any]) -> list[float]:
    """Every stage has the loss of a model in which nothing is trained, from the beginning or later."""
    errors = []
    for late in (False, True):
        parallel, model = pair({"pp": 2}, plan)
        if late:
            parallel(batch(0)).backward()
        for each in (parallel, model):
            each.requires_grad_(False)
        loss = parallel(batch(1))
        assert not loss.requires_grad
        errors.append(abs(float(loss - model(batch(1)))))
        with pytest.raises(InvariantError, match="its loss has none"):
            parallel.train_step(x=batch(1))
    return errors


@pytest.mark.parametrize("plan", [{}])
def test_a_frozen_pipeline(plan: dict[str, Any]) -> None:
    for errors in run_ranks(frozen, 2, plan):
        assert max(errors) < 1e-12


def around() -> list[float]:
    parallel, model = pair({}, {})
    errors = []
    for seed in range(2):
        inputs = [batch(seed).requires_grad_() for _ in range(2)]
        for each, x in zip((parallel, model), inputs):
            checkpoint(each, x, use_reentrant=False).backward()
        errors.append((inputs[0].grad - inputs[1].grad).abs().max().item())  # type: ignore[operator]
    wanted = dict(model.named_parameters())
    errors += [(full_of(p.grad) - wanted[name].grad).abs().max().item() for name, p in parallel.named_parameters()]
    called = pair({}, {})[0]
    called(batch(0))
    transforms: list[Callable[[nn.Module], Any]] = [
        lambda each: torch.func.grad(each)(batch(0)),
        lambda each: torch.func.vmap(each)(torch.stack([batch(0), batch(1)])),
        lambda each: torch.func.jvp(each, (batch(0),), (batch(1),)),
    ]
    for transform in transforms:
        for each in (called, pair({}, {})[0]):
            with pytest.raises(InvariantError, match="within a transform of torch.func"):
                transform(each)
    return errors


def test_what_is_around_a_call() -> None:
    (errors,) = run_ranks(around, 1)
    assert max(errors) < 1e-12
