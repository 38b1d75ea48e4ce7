"""A call by the names of ``forward``, for a model and for its program, in whatever way either was called before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from inspect import Parameter
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.ir.batch import input_rows
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind


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


def misfits(model: nn.Module, program: AnyProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """What a program takes that this model and this call do not have, in words: it is of another model, or batch.

    Rows of parts of a batch are not compared, nor arguments that hold several tensors.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = isinstance(program, Program) and program.plan.microbatches == 1
    for part in program.parts:
        for node, entry in part.placeholders(InputKind.PARAMETER):
            known, wanted = parameters.get(entry.target), list(value(node).shape)
            if known is None:
                yield f"it has a parameter '{entry.target}' of {wanted}, the model has none of that name"
            elif list(known.shape) != wanted:
                yield f"its parameter '{entry.target}' is {wanted}, that of the model {list(known.shape)}"
        rows = input_rows(part)
        try:
            batch = batch_by_name(model, args, kwargs)
        except ValueError:
            continue
        for node, entry in part.placeholders(InputKind.INPUT):
            given, shape = batch.get(entry.target), list(value(node).shape)
            if not isinstance(given, Tensor):
                continue
            here = list(given.shape)
            if not whole and node in rows and len(here) == len(shape):
                here[rows[node]] = shape[rows[node]]
            if here != shape:
                yield f"it takes '{entry.target}' of {shape}, the call has {list(given.shape)}"
