"""In ``no_sync`` a script that reads, changes or drops ``.grad`` has what it has on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.errors import AutoparError
from autopar.module import ParallelModule
from tests.against_one_process import compare_gradients, difference, float64, worst
from tests.launch import run_ranks
from tests.selection import slow_but
from tests.traffic import sent_since

Model = Any
Habit = Callable[[Model, Callable[..., Tensor]], Any]


class Net(nn.Module):
    """Fused thirds, so that on ``tp`` parts are no neighbours; a tied weight; a bias of uneven parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.fused, self.down = nn.Linear(4, 6), nn.Linear(6, 18), nn.Linear(6, 4, bias=False)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.fused(torch.tanh(self.up(x))).chunk(3, -1)
        return (self.down(a * b + c + self.tied(x)) - x).square().mean()


def batch(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def named(model: Model, part: str) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if part in name]


def sgd(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def dropped(model: Model, waits: Callable[..., Tensor]) -> None:
    waits(0)
    for parameter in model.parameters():
        parameter.grad = None
    assert not isinstance(model, ParallelModule) or not model._accumulation._held  # the memory of sums is free
    waits(1)


def dropped_in_part(model: Model, waits: Callable[..., Tensor]) -> None:
    waits(0)
    for parameter in named(model, "down") + named(model, "bias"):
        parameter.grad = None
    waits(1)
    waits(2, 4)


def halved(model: Model, waits: Callable[..., Tensor]) -> None:
    for seed in range(3):
        waits(seed)
        for parameter in model.parameters():
            parameter.grad *= 0.5


def replaced(model: Model, waits: Callable[..., Tensor]) -> None:
    waits(0)
    for parameter in named(model, "fused"):
        parameter.grad = parameter.detach() * 0.1
    waits(1)


def added_to(model: Model, waits: Callable[..., Tensor]) -> None:
    """Before, after and by a penalty in the same backward pass; nothing of it is looked at."""
    for parameter in named(model, "up"):
        parameter.grad = parameter.detach() * 0.1
    waits(0)
    for parameter in model.parameters():
        parameter.grad.add_(parameter.detach())
    waits(1, 6, lambda: sum(parameter.square().sum() for parameter in model.parameters()))


def stepped(model: Model, waits: Callable[..., Tensor]) -> None:
    optimizer = sgd(model)
    for seed in range(4):
        waits(seed)
        waits(seed, 4)
        optimizer.step()
        optimizer.zero_grad(set_to_none=seed < 2)


def clipped(model: Model, waits: Callable[..., Tensor]) -> list[Tensor]:
    waits(0)
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 0.1)]
    waits(1)
    by_module = getattr(model, "clip_grad_norm_", lambda most: nn.utils.clip_grad_norm_(model.parameters(), most))
    norms.append(by_module(0.2))
    waits(2)
    return [*norms, *(parameter.grad.clone() for parameter in model.parameters())]


def kept(model: Model, waits: Callable[..., Tensor]) -> list[Tensor]:
    """The objects in ``.grad`` stay those that they are."""
    waits(0)
    held = [parameter.grad for parameter in model.parameters()]
    waits(1)
    assert all(one is parameter.grad for one, parameter in zip(held, model.parameters()))
    found = [one * 2 for one in held]
    assert not any(vars(one) for one in held)  # no mark of ours is left, which nobody could write to a file
    return found


def frozen(model: Model, waits: Callable[..., Tensor]) -> None:
    waits(0)
    for parameter in named(model, "fused"):
        parameter.requires_grad_(False)
    waits(1)


def in_parts(model: Model, waits: Callable[..., Tensor]) -> None:
    waits(0)
    if isinstance(model, ParallelModule):
        model.train_step(x=batch(1))
        with model.no_sync():
            model.train_step(x=batch(2))
    else:
        for seed in (1, 2):
            model(x=batch(seed)).backward()
    for parameter in named(model, "down"):
        parameter.grad *= 3


def interrupted(model: Model, waits: Callable[..., Tensor]) -> None:
    """A batch whose second part fails adds nothing."""
    waits(0)
    if isinstance(model, ParallelModule):
        parts = iter((False, True))

        def fail(*_: Any) -> None:
            if next(parts):
                raise MemoryError

        handle = model.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model.train_step(x=batch(1))
        handle.remove()


HABITS: tuple[Habit, ...] = (
    *(dropped, dropped_in_part, halved, replaced, added_to, stepped, clipped, kept, frozen, in_parts, interrupted),
)


def errors(axes: dict[str, int], plan: dict[str, Any]) -> dict[str, float]:
    """By habit, the worst difference of a gradient, a parameter or a result from those of one device."""
    found = {}
    for habit in HABITS:
        model = float64(Net)
        reference = copy.deepcopy(model)
        parallel = autopar.parallelize(model, Mesh(**axes), Plan(check_numerics=False, timeout=30.0, **plan))
        parallel.prepare(x=batch(0))
        results = [_done(habit, module) for module in (parallel, reference)]
        _done(lambda _, waits: waits(5), parallel, waits=False)
        reference(x=batch(5)).backward()
        found[habit.__name__] = max(
            worst(compare_gradients(parallel, reference))[0],
            *(difference(p, q) for p, q in zip(parallel.parameters(), reference.parameters())),
            *(difference(p, q) for p, q in zip(*results)),
        )
    return found


def _done(habit: Habit, model: Model, waits: bool = True) -> list[Any]:
    def backward(seed: int, rows: int = 6, more: Callable[[], Any] = lambda: 0) -> Tensor:
        with model.no_sync() if waits and isinstance(model, ParallelModule) else nullcontext():
            loss = model(x=batch(seed, rows)) + more()
            loss.backward()
        return loss

    found = habit(model, backward)
    return found if isinstance(found, list) else []


@pytest.mark.parametrize(
    ("axes", "plan"),
    slow_but(
        [0],
        [
            ({"dp": 2}, {"microbatches": 2}),
            ({"dp": 2, "tp": 2}, {"microbatches": 2}),
            ({"dp": 2}, {"zero": 1, "microbatches": 2}),
            ({"dp": 2}, {"zero": 3, "microbatches": 2}),
            ({"dp": 1}, {"microbatches": 2}),
        ],
    ),
)
def test_as_on_one_device(axes: dict[str, int], plan: dict[str, Any]) -> None:
    for found in run_ranks(errors, Mesh(**axes).world_size, axes, plan):
        assert max(found.values()) < 1e-12, found


def what_is_sent() -> tuple[list[int], list[str]]:
    """Sums over ``dp`` after each part of a window, and what is said to who reads a gradient alone, or too late."""
    parallel = autopar.parallelize(float64(Net), Mesh(dp=2), Plan(check_numerics=False, timeout=30.0))
    parallel.prepare(x=batch(0))
    sums, before, said = [], parallel.traffic, list[str]()

    def sent() -> None:
        now = sent_since(before, parallel.traffic)
        sums.append(sum(entry.operations for entry in now if entry.phase == "backward"))

    with parallel.no_sync():
        for seed in range(2):
            parallel(x=batch(seed)).backward()
    sent()
    assert all(parameter.grad is not None for parameter in parallel.parameters())
    taken = parallel.down.weight.grad
    parallel.down.weight.grad = taken
    sent()
    parallel.zero_grad()
    for read in (lambda: taken.norm(), lambda: alone(parallel)):
        with parallel.no_sync():
            parallel(x=batch(2)).backward()
        if not said:
            sent()
        with pytest.raises(AutoparError) as caught:
            read()
        said.append(str(caught.value))
    return sums, said


def alone(parallel: ParallelModule) -> None:
    if torch.distributed.get_rank() == 0:
        parallel.down.weight.grad.norm()
    parallel(x=batch(3))


def test_nothing_is_sent_for_what_is_dropped() -> None:
    for sums, (late, alone) in run_ranks(what_is_sent, 2):
        assert sums == [0, 0, 0]
        assert "was taken out of .grad while passes in no_sync() waited" in late
        assert "rank 0: computing with gradients that wait since no_sync()" in alone
