"""A call by the names of ``forward``, for a model and for its program, in whatever way either was called before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from inspect import Parameter
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from autopar.ir.program import AnyProgram


def batch_by_name(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that ``forward`` gives them. Raises ValueError for others than it takes."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as problem:
        raise ValueError(f"example_inputs do not fit the model: {problem}\nWay out: a dict by name.") from problem
    found: dict[str, Any] = {}
    for name, given in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind in (Parameter.VAR_POSITIONAL, Parameter.POSITIONAL_ONLY):
            raise ValueError(f"forward takes '{name}' by place only\nWay out: leave out the layer float64.")
        found |= given if kind is Parameter.VAR_KEYWORD else {name: given}
    return found


def called_by_name(
    model: nn.Module, program: AnyProgram, batch: Mapping[str, Any]
) -> tuple[AnyProgram, dict[str, Any]]:
    """``program`` for a call by name, and the call: ``batch``, in the order in which the program takes its arguments.

    Raises ValueError where the program takes other arguments than ``batch`` has.
    """
    if program.in_spec is None:
        return program, dict(batch)
    args, kwargs = pytree.tree_unflatten(list(range(program.in_spec.num_leaves)), program.in_spec)
    places = batch_by_name(model, tuple(args), kwargs)
    if places.keys() != batch.keys():
        raise ValueError(f"the program takes {', '.join(places)}, the call has {', '.join(batch)}")
    ordered = {
        name: batch[name] for name in sorted(places, key=lambda name: min(pytree.tree_leaves(places[name]), default=-1))
    }
    return replace(program, in_spec=pytree.tree_structure(((), ordered))), ordered
