"""The signature of the traced call: the tensors of another call in its order, and outputs in the model's structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.ir.program import AnyProgram


def user_tensors(program: AnyProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call in the order of the program's ``INPUT`` entries; checks the arguments that are static."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if spec != program.in_spec:
        raise TraceError(
            f"the call has other arguments than the traced one:\n  now    {spec}\n  traced {program.in_spec}"
        )
    static = dict(program.static_inputs)
    for position, expected in static.items():
        found = leaves[position]
        if isinstance(found, Tensor) or found != expected:
            raise TraceError(f"argument {position} was {expected!r} when the model was traced and is {found!r} now")
    return [leaf for position, leaf in enumerate(leaves) if position not in static]


def restorer(program: AnyProgram) -> Callable[[Sequence[Any]], Any]:
    """:func:`restore_output` of ``program``; quick where the output is a flat dict or tuple of tensors."""
    spec = program.out_spec
    if spec is None:
        return tuple
    if not program.static_outputs and all(child.is_leaf() for child in spec.children()):
        if spec.type is dict:
            keys = tuple(spec.context)
            return lambda tensors: dict(zip(keys, tensors))
        if spec.type is tuple:
            return tuple
    return partial(restore_output, program)


def restore_output(program: AnyProgram, tensors: Sequence[Any]) -> Any:
    """The model's own output structure around the user outputs among ``tensors`` (in the order of ``outputs``)."""
    assert program.out_spec is not None
    values = iter(tensors)
    static = dict(program.static_outputs)
    leaves = [
        static[position] if position in static else next(values) for position in range(program.out_spec.num_leaves)
    ]
    return pytree.tree_unflatten(leaves, program.out_spec)
