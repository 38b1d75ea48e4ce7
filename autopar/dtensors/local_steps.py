"""Steps of torch's elementwise optimizers compute on this rank's parts of DTensors, without DTensor's dispatch.

Where ``Adam.step`` and the like have collected parameters, gradients and states they call a public function of torch's,
``torch.optim.adam.adam(params, grads, ...)``. That function is handed the parts, so that hooks, groups, states,
closures and checkpoints know nothing of it. Its operators treat each number alone, so the numbers are those of
DTensor's dispatch, which costs about 30 us an operator and has no Rprop and no fused SGD and Adagrad. On CUDA torch
then takes its ``foreach`` form by default, as for ordinary parameters, and not the loop.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from autopar.dtensors.dtensor import HELD, local_of, of_local, spec_of

Update = Callable[..., None]  # of lists of what belongs together, parameters first, and options

# each is torch.optim.NAME.NAME
ELEMENTWISE = ("adadelta", "adagrad", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd")


@cache
def let_optimizers_use_parts() -> None:
    """Let the steps of all optimizers of this process do so, for the parameters of parallel modules."""
    for name in ELEMENTWISE:
        module: Any = importlib.import_module(f"torch.optim.{name}")
        setattr(module, name, on_parts(getattr(module, name)))


def on_parts(update: Update) -> Update:
    """``update`` that computes on parts where all that belongs to a parameter is held as the parameter is."""

    @wraps(update)
    def updated(params: list[Tensor], *states: list[Any], **options: Any) -> None:
        split = [param for param in params if isinstance(param, DTensor)]
        if not split or not _is_plain(options) or not all(map(_is_fit, zip(params, *filter(len, states), strict=True))):
            update(params, *states, **options)
            return
        parts: Any = [[local_of(state) for state in each] for each in states]
        update([local_of(param) for param in params], *parts, **options)
        increment_version(split)  # as operators on them do
        for each, found in zip(states, parts):
            if any(state is None for state in each):
                each[:] = [_as_held(*three) for three in zip(params, each, found)]

    return updated


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether none is a DTensor, and no gradient goes through the step."""
    if options.get("differentiable") or torch.compiler.is_compiling():
        return False
    return not any(isinstance(option, DTensor) for option in options.values())


def _is_fit(together: tuple[Any, ...]) -> bool:
    """Whether the states of a parameter, which comes first, are held in the parts in which it is."""
    param, *states = together
    if not isinstance(param, DTensor):
        return not any(isinstance(state, DTensor) for state in states)
    if HELD not in vars(param):  # of no parallel module
        return False
    spec = spec_of(param)
    for state in states:
        if isinstance(state, DTensor):
            own = spec_of(state)
            if own is not spec and (own.placements, own.shape, own.mesh) != (spec.placements, spec.shape, spec.mesh):
                return False
        elif state is not None and state.dim():  # a whole tensor: DTensor's dispatch refuses it
            return False
    return True


def _as_held(param: Tensor, state: Tensor | None, found: Tensor | None) -> Tensor | None:
    """``state``, or where there was none (SGD's first momentum) what was ``found``, as ``param`` is held."""
    if state is not None or found is None or not isinstance(param, DTensor):
        return found if state is None else state
    return of_local(found, spec_of(param))
