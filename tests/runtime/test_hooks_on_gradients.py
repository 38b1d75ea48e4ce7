"""Hooks on gradients where several batches, or parts of one, make a step: they see what they would on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import autopar
from autopar import AutoparError, Mesh, Plan
from autopar.ir.loss import loss_of
from tests.against_one_process import compare_gradients, difference, float64, worst
from tests.launch import run_ranks
from tests.selection import slow_but

Model = torch.nn.Module
BATCHES = [
    {"x": torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))} for seed in range(4)
]


class Net(Model):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.down(torch.tanh(self.up(x))) - x).square().mean()  # type: ignore[no-any-return]


def clamps(model: Model) -> Callable[[], None]:
    """Clip each gradient by value, and take a step where ``step`` is called."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.register_hook(lambda grad: grad.clamp(-0.01, 0.01))  # type: ignore[no-untyped-call]

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_in_backward(model: Model) -> Callable[[], None]:
    own = {parameter: torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        own[parameter].step()  # type: ignore[index]
        own[parameter].zero_grad()  # type: ignore[index]

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(step)
    return lambda: None


HABITS = {"clamps": clamps, "steps in backward": steps_in_backward}


def trained(ranks: int, plan: Plan, habit: str, window: int) -> float:
    """The worst error of a parameter: each batch in its microbatches, ``window`` of them before a step."""
    model = float64(Net)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=ranks), plan)
    parallel.prepare(**BATCHES[0])
    steps = [HABITS[habit](module) for module in (parallel, reference)]
    for place, batch in enumerate(BATCHES, 1):
        with nullcontext() if place % window == 0 else parallel.no_sync():
            parallel.train_step(**batch)
        loss_of(reference(**batch)).backward()
        for step in steps if place % window == 0 else ():
            step()
    return max(difference(p, q) for p, q in zip(parallel.parameters(), reference.parameters()))


RUNS = [(2, 0, 2, 1), (2, 3, 2, 1), (2, 0, 1, 2), (1, 0, 2, 1), (2, 1, 2, 2)]  # ranks, stage, microbatches, window


@pytest.mark.parametrize(("habit", "run"), slow_but([0, 7], [(habit, run) for habit in HABITS for run in RUNS]))
def test_they_see_the_gradients_of_one_device(habit: str, run: tuple[int, int, int, int]) -> None:
    ranks, stage, microbatches, window = run
    plan = Plan(zero=stage, microbatches=microbatches, check_numerics=False)
    assert max(run_ranks(trained, ranks, ranks, plan, habit, window)) < 1e-12


def hooks_later(axes: dict[str, int]) -> float:
    """The worst error of a gradient where a hook comes after passes that wait, and where a parameter is frozen late."""
    model = float64(Net)
    reference = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(**axes), Plan(check_numerics=False, timeout=20.0))
    parallel.prepare(**BATCHES[0])
    for module in (parallel, reference):
        with parallel.no_sync():
            loss_of(module(**BATCHES[0])).backward()
        for parameter in module.parameters():
            parameter.register_hook(lambda grad: 2 * grad)  # type: ignore[no-untyped-call]
        loss_of(module(**BATCHES[1])).backward()
        loss = loss_of(module(**BATCHES[2]))
        module.get_parameter("up.weight").requires_grad_(False)
        loss.backward()
    return worst(compare_gradients(parallel, reference))[0]


@pytest.mark.parametrize("axes", slow_but([0], [{"dp": 2}, {"dp": 1}]))
def test_hooks_see_the_passes_after_them(axes: dict[str, int]) -> None:
    assert max(run_ranks(hooks_later, Mesh(**axes).world_size, axes)) < 1e-12


def hook_on_a_pipeline() -> str:
    parallel = autopar.parallelize(float64(Net), Mesh(pp=2), Plan(check_numerics=False, timeout=20.0))
    loss = loss_of(parallel(**BATCHES[0]))
    if dist.get_rank() == 0:  # the other one has another stage
        parallel.get_parameter("up.weight").register_hook(lambda grad: 3 * grad)  # type: ignore[no-untyped-call]
    with pytest.raises(AutoparError) as caught:
        loss.backward()
    return str(caught.value)


def test_a_hook_after_the_forward_pass_of_a_pipeline_is_refused() -> None:
    for message in run_ranks(hook_on_a_pipeline, 2):
        assert "a hook on the gradient of 'up.weight' was registered between the forward pass" in message
