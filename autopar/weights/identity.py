"""Parameters keep who they are when they become DTensors: their marks, hooks and gradients, and optimizers find them.

A DTensor is an object of another kind than a parameter, so ``parallelize`` puts new objects into the model. What a
script has attached to the old ones (``p._no_weight_decay``, ``p.register_hook``) goes over to the new. An optimizer
that was made before, as scripts for DistributedDataParallel do, is given the new ones: at once if it can be found, at
the latest before its first step, with its states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from autopar.autodiff.autograd import is_watched
from autopar.communication.connect import Connection
from autopar.dtensors.dtensor import HELD, parameter_of
from autopar.dtensors.made_optimizers import made_optimizers
from autopar.dtensors.whole_operators import whole
from autopar.errors import InvariantError
from autopar.weights.stored import Stored, cut

_NOW = "autopar_now"  # on a parameter that another has replaced: that one
_GONE = "autopar_gone"  # on a parameter that a stack has replaced: the name of that
WHOLE_ONLY = (torch.optim.Adafactor,)
_OURS = (_NOW, _GONE, HELD)


@dataclass(frozen=True)
class Holder:
    """How a parameter is held, for tensors like it."""

    form: Stored
    own: Connection

    def cut(self, tensor: Tensor) -> DTensor:
        """The part of ``tensor``, which is in the model's order; collective where it is in other parts."""
        return cut(whole(tensor), self.form, self.own)


def become(tensor: Tensor, holder: Holder) -> nn.Parameter:
    """The parameter that holds ``tensor`` as ``holder`` says: the same object if it is a DTensor."""
    held = parameter_of(holder.cut(tensor), tensor.requires_grad)
    grad = None if tensor.grad is None else holder.cut(tensor.grad)
    marks = {key: mark for key, mark in vars(tensor).items() if key not in _OURS}
    hooks, after = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    if isinstance(tensor, DTensor):
        torch.utils.swap_tensors(tensor, held)  # type: ignore[no-untyped-call]
        now: Any = tensor
    else:
        setattr(tensor, _NOW, held)
        now = held
    vars(now).update(marks)
    setattr(now, HELD, holder)
    if hooks is not None:
        now._backward_hooks = hooks
    if after is not None:
        now._post_accumulate_grad_hooks = after
    now.grad = grad
    _watch_optimizers()
    _state.generation += 1
    found: nn.Parameter = now
    return found


@contextmanager
def kept(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within this context, torch may put other data into ``parameters`` (``module.to``); marks and hooks stay."""
    before = [(p, dict(vars(p)), p._backward_hooks, p._post_accumulate_grad_hooks) for p in parameters]
    yield
    for parameter, marks, hooks, after in before:
        vars(parameter).update(marks)
        if hooks is not None:
            parameter._backward_hooks = hooks
        if after is not None:
            parameter._post_accumulate_grad_hooks = after


def give_to_optimizers() -> None:
    """Let all optimizers have the present parameters in place of those that were replaced."""
    for optimizer in made_optimizers():
        _renew(optimizer)


def mark_gone(parameter: Tensor, name: str) -> None:
    """Let an optimizer that has ``parameter``, which the stack ``name`` has replaced, raise InvariantError.

    So does this where a hook is registered on it.
    """
    if is_watched(parameter):
        raise InvariantError(
            f"a hook is registered on the gradient of a parameter of one expert, and '{name}' takes its place: the "
            "hook would not be called\n"
            "Way out: parallelize(model, mesh, example_inputs=batch), then register hooks on its parameters."
        )
    setattr(parameter, _GONE, name)
    _watch_optimizers()
    _state.generation += 1


class _State:
    """``generation`` changes with the parameters of any module; ``seen``: that in which an optimizer had its last.

    ``steps``: of all optimizers of this process.
    """

    def __init__(self) -> None:
        self.generation, self.steps = 0, 0
        self.seen: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()


_state = _State()


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    plain = Optimizer.load_state_dict

    @wraps(plain)
    def load_state_dict(optimizer: Optimizer, state_dict: Any) -> None:
        plain(optimizer, state_dict)
        _state.seen.pop(optimizer, None)  # what was loaded may be whole

    loading: Any = load_state_dict
    Optimizer.load_state_dict = loading  # type: ignore[method-assign]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """It costs something only after parameters have changed. Raises InvariantError for what cannot be stepped."""
    if _state.seen.get(optimizer) == _state.generation:
        return
    for parameter in _parameters(optimizer):
        _refuse_gone(parameter)
    _renew(optimizer)
    _refuse_unfit(optimizer)
    _state.seen[optimizer] = _state.generation


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _state.steps += 1


def optimizer_steps() -> int:
    """How many steps the optimizers of this process have made since there are parallel modules."""
    return _state.steps


def _renew(optimizer: Optimizer) -> None:
    """Let the optimizer, whosever it is, have the present parameters; what it cannot step, it says at its step."""
    for group in getattr(optimizer, "param_groups", ()):
        for place, parameter in enumerate(group["params"]):
            now = _now(parameter)
            if now is not parameter:
                group["params"][place] = now
                if parameter in optimizer.state:
                    optimizer.state[now] = optimizer.state.pop(parameter)
            _fit_state(now, optimizer.state.get(now, {}))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _now(parameter: Tensor) -> Tensor:
    while (now := getattr(parameter, _NOW, None)) is not None:
        parameter = now
    return parameter


def _fit_state(parameter: Tensor, state: Any) -> None:
    """Hold the tensors of an optimizer's state that are like the parameter as it is held."""
    holder: Holder | None = getattr(parameter, HELD, None)
    if holder is None:
        return
    for key in _like(parameter, state):
        held = state[key]
        if isinstance(held, DTensor) and held.placements == parameter.placements:  # type: ignore[attr-defined]
            continue
        state[key] = holder.cut(held)


def _like(parameter: Tensor, state: Any) -> Iterable[str]:
    tensors = {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}
    return [key for key, tensor in tensors.items() if tensor.dim() and tensor.shape == parameter.shape]


def _refuse_unfit(optimizer: Optimizer) -> None:
    """Raise InvariantError for an optimizer of torch's that would fail on parts, or be wrong on stages."""
    kind = type(optimizer).__name__
    for parameter in _parameters(optimizer):
        holder: Holder | None = getattr(parameter, HELD, None)
        if holder is None:
            continue
        if type(optimizer) in WHOLE_ONLY and holder.form.layout.axes:
            raise InvariantError(
                f"torch.optim.{kind} cannot update parameters that are split over ranks: torch has no such step for "
                "DTensors\nWay out: another optimizer (AdamW, SGD, NAdam, LBFGS, ...), or a mesh and a plan by which "
                "parameters are whole: dp with zero=0."
            )
        if isinstance(optimizer, torch.optim.LBFGS) and holder.own.comm.mesh.is_pipelined:
            raise InvariantError(
                "torch.optim.LBFGS takes products over all parameters, and a pipeline rank has those of its stages\n"
                "Way out: a mesh without pp."
            )


def _refuse_gone(parameter: Tensor) -> None:
    name = getattr(parameter, _GONE, None)
    if name is not None:
        raise InvariantError(
            f"the optimizer has a parameter of one expert; the parallel module has '{name}' for all of them\n"
            "Way out: parallelize(model, mesh, example_inputs=batch), then make an optimizer of its parameters."
        )
