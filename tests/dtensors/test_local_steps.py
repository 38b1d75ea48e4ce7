"""Optimizers that compute on parts leave what DTensor's dispatch would, bit for bit."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.dtensor import HELD, local_of
from autopar.dtensors.local_steps import ELEMENTWISE, on_parts
from tests.launch import run_ranks
from tests.runtime import fused

STEPS = 4
DECAY = {"weight_decay": 0.1}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Adadelta", DECAY),
    ("Adagrad", DECAY | {"lr_decay": 0.1}),
    ("Adam", DECAY),
    ("Adam", {"amsgrad": True, "maximize": True}),
    ("Adam", {"fused": True}),
    ("AdamW", {"foreach": True}),
    ("AdamW", {"lr": torch.tensor(0.01)}),
    ("AdamW", {"amsgrad": True, "fused": True}),
    ("Adamax", DECAY),
    ("ASGD", {"t0": 1.0}),
    ("NAdam", DECAY | {"decoupled_weight_decay": True}),
    ("RAdam", DECAY),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
    ("RMSprop", {"foreach": True}),
    ("SGD", {}),
    ("SGD", DECAY | {"momentum": 0.9, "nesterov": True}),
    ("SGD", {"momentum": 0.9, "foreach": True}),
]
OF_PARTS_ALONE: list[tuple[str, dict[str, Any]]] = [  # torch has no such of DTensors
    ("Adagrad", {"fused": True}),
    ("Rprop", {}),
    ("SGD", {"momentum": 0.9, "fused": True}),
]


class Uneven(nn.Module):
    """Over two ranks rows and columns are 3 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        error: Tensor = self.down(torch.tanh(self.up(ids[:, :4].float()))).sum(1) - labels[:, 0]
        return error.square().mean()


class OfDTensors(TorchDispatchMode):
    """Counts operators that are given a DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(issubclass(kind, DTensor) for kind in types)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_torch_does() -> Iterator[None]:
    """Within this context, no optimizer is handed parts."""
    with ExitStack() as replaced:
        for name in ELEMENTWISE:
            module = importlib.import_module(f"torch.optim.{name}")
            replaced.enter_context(mock.patch.object(module, name, getattr(module, name).__wrapped__))
        yield


def gradients(module: nn.Module, step: int) -> list[Tensor | None]:
    """The same of all copies of a module; in the second step one parameter has none."""
    torch.manual_seed(step)
    cut = [getattr(parameter, HELD).cut(torch.randn(parameter.shape)) for parameter in module.parameters()]
    return [None if step == 1 and place == 1 else grad for place, grad in enumerate(cut)]


def ordinary(tensor: Tensor) -> Tensor:
    return nn.Parameter(local_of(tensor.detach()).clone())


def state_of(optimizer: Any) -> list[Any]:
    groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(local_of(p), *[(key, local_of(s)) for key, s in optimizer.state[p].items()]) for p in groups]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


# ---------------------------------------------------------------- on two ranks


class Steps:
    """Some steps of ``parameters``; ``states`` after each.

    ``dispatched``: operators on DTensors in the last one, when each parameter has all its states; ``unnoticed``:
    parameters that changed while their version did not.
    """

    def __init__(self, module: nn.Module, parameters: Iterable[Tensor], kind: str, options: dict[str, Any]) -> None:
        parameters = list(parameters)
        optimizer = getattr(torch.optim, kind)(parameters, **copy.deepcopy(options))
        self.states: list[Any] = []
        self.unnoticed = 0
        for step in range(STEPS):
            for parameter, grad in zip(parameters, gradients(module, step)):
                parameter.grad = grad if grad is None or isinstance(parameter, DTensor) else local_of(grad)
            before = [parameter._version for parameter in parameters]
            calls = OfDTensors()
            with calls if step == STEPS - 1 else nullcontext():  # it is slow
                optimizer.step()
            self.states.append(copy.deepcopy(state_of(optimizer)))
            same = [
                parameter._version == old for parameter, old in zip(parameters, before) if parameter.grad is not None
            ]
            self.unnoticed += sum(same)
        self.dispatched = calls.count


def compare(mesh: str, cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What differs, on this rank, from optimizers of ordinary parameters, and from DTensor's dispatch."""
    wrong: list[str] = []
    torch.manual_seed(0)
    model, plan = (Uneven(), Plan(zero=3)) if mesh == "dp=2" else (fused.Fused(), Plan())
    module = autopar.parallelize(model, Mesh.parse(mesh), plan, example_inputs=fused.batch(0))
    for kind, options in cases:
        case = f"{kind} {options}"
        found = Steps(module, copy.deepcopy(module).parameters(), kind, options)
        wanted = [Steps(module, map(ordinary, module.parameters()), kind, options)]
        if (kind, options) not in OF_PARTS_ALONE:
            with as_torch_does():
                wanted.append(Steps(module, copy.deepcopy(module).parameters(), kind, options))
            wrong += [f"{case}: nothing to see"] * (wanted[-1].dispatched == 0)
        wrong += [f"{case}: numbers"] * (not all(alike(found.states, each.states) for each in wanted))
        wrong += [f"{case}: {found.dispatched} operators on DTensors"] * (found.dispatched > 0)
        wrong += [f"{case}: {found.unnoticed} changes unnoticed"] * (found.unnoticed > 0)
    return wrong


USUAL = [("AdamW", {}), ("SGD", DECAY | {"momentum": 0.9, "nesterov": True}), OF_PARTS_ALONE[0]]


def test_parts_are_updated_as_dtensors() -> None:
    assert run_ranks(compare, 2, "dp=2", USUAL) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2", "tp=2"])
def test_parts_are_updated_by_all_optimizers(mesh: str) -> None:
    assert run_ranks(compare, 2, mesh, CASES + OF_PARTS_ALONE) == [[], []]


# ---------------------------------------------------------------- what is left to torch


def held(rows: int) -> Any:
    """A parameter of a parallel module on this process alone, with a gradient."""
    module = autopar.parallelize(nn.Linear(3, rows), Mesh(), example_inputs=(torch.ones(1, 3),))
    found = module.weight
    assert isinstance(found, DTensor)
    found.grad = torch.ones_like(found)
    return found


@pytest.mark.parametrize(
    "changed", ["nothing", "not ours", "other placements", "other shape", "a whole state", "option"]
)
def test_what_is_not_held_alike_is_left_to_torch(changed: str) -> None:
    param, options = held(2), {}
    grad = param.grad
    state = torch.zeros_like(param)
    match changed:
        case "not ours":
            param = nn.Parameter(DTensor.from_local(local_of(param), param.device_mesh, param.placements))
        case "other placements":
            state = DTensor.from_local(local_of(state), param.device_mesh, [Partial()] * param.device_mesh.ndim)
        case "other shape":
            state = torch.zeros_like(held(1))
        case "a whole state":
            state = local_of(state)
        case "option":
            options = {"lr": state}
    given: list[Any] = []
    on_parts(lambda *lists, **_: given.extend(lists))([param], [grad], [], [state], **options)
    assert all(isinstance(each, DTensor) for each in (given[0][0], given[1][0])) is (changed != "nothing")
    assert given[2] == []


def test_steps_under_hooks_and_closures() -> None:
    """Hooks and states see DTensors; an error in an update is the script's own, and changes nothing else."""
    param = held(2)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda own, *_: seen.append(own.param_groups[0]["params"][0]))
    optimizer.register_step_post_hook(lambda own, *_: seen.append(own.state[param]["momentum_buffer"]))
    before = local_of(param).clone()
    assert float(optimizer.step(lambda: torch.tensor(3.0))) == 3.0
    assert all(isinstance(each, DTensor) for each in seen) and len(seen) == 2
    assert seen[0] is param and torch.equal(local_of(param), before - 0.1)
    optimizer.param_groups[0]["lr"] = "much"
    with pytest.raises(TypeError):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == [param] and isinstance(
        optimizer.state[param]["momentum_buffer"], DTensor
    )
