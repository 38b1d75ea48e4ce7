"""Operators on DTensors of parallel modules that torch does wrongly, or does not do.

The fourth door to the private parts of DTensor. In torch 2.13 a result that is a sum, or a norm, over ranks still to
be finished (``Partial``) goes wrong where the next operator is not linear: ``weight.norm(dim=0).sum()``,
``relu(grad.sum() - 0.1)``, ``grad.sum().fill_(1)``. Here it is finished first, unless it is only put beside others.
Operators without a rule compute on whole tensors, but those that draw: a rank would draw other numbers. So does what no
part without a number has, the largest of none: ``grad.norm(inf)`` of 5 rows on 4 ranks, of which one has no row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._op_schema import OpSchema, OutputSharding
from torch.utils import _pytree as pytree

from autopar.dtensors.dtensor import spec_of
from autopar.dtensors.whole_operators import finish, on_whole, tensors_written
from autopar.ir.operator_facts import is_random

aten = torch.ops.aten
OwnsMesh = Callable[[DeviceMesh], bool]
JOINING = {  # of values that are to be finished they make one such value
    *(aten.detach.default, aten.alias.default, aten.clone.default, aten.stack.default, aten.cat.default),
    *(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.t.default),
    *(aten.transpose.int, aten.permute.default, aten.expand.default),
}
EXTREMES = {
    *(aten.max.default, aten.min.default, aten.max.dim, aten.min.dim, aten.amax.default, aten.amin.default),
    *(aten.argmax.default, aten.argmin.default, aten.aminmax.default, aten._foreach_max.default),
}
NORMS = {aten.linalg_vector_norm.default}  # of norms of parts
UNHEARD = (NotImplementedError, RuntimeError, AssertionError, ValueError)  # by what torch says that it has no rule


@cache
def correct_rules(owns: OwnsMesh) -> None:
    """Let it be so for tensors on meshes that ``owns`` knows."""
    dispatcher: Any = DTensor._op_dispatcher
    usual = dispatcher._propagate_op_sharding_dispatch_slow_path

    def propagated(operator: Any, args: Any, kwargs: Any, op_info: Any, *rest: Any) -> Any:
        """How ``operator`` is computed on parts (an ``OutputSharding``), or its result."""
        if not owns(op_info.compute_mesh):
            return usual(operator, args, kwargs, op_info, *rest)
        unfinished = [tensor for tensor in tensors_written(operator, args, kwargs) if _is_unfinished(spec_of(tensor))]
        if unfinished:
            for tensor in unfinished:
                finish(tensor)
            return operator(*args, **kwargs)
        if _looks_into_none(operator, args, kwargs):
            if operator is aten._foreach_norm.Scalar:
                return [aten.linalg_vector_norm.default(tensor, *args[1:], **kwargs) for tensor in args[0]]
            return on_whole(operator, args, kwargs)
        try:
            found = _of_finished(usual, operator, args, kwargs, op_info, *rest)
        except UNHEARD:
            if is_random(operator):
                raise
            found = None
        return on_whole(operator, args, kwargs) if found is None else found

    dispatcher._propagate_op_sharding_dispatch_slow_path = propagated
    handlers: Any = dispatcher._custom_op_handlers
    for operator in handlers.keys() & EXTREMES:
        handlers[operator] = _of_some(handlers[operator], owns)


def _of_some(usual: Any, owns: OwnsMesh) -> Any:
    """``usual``, torch's own handler of an extreme, where each rank has numbers."""

    def handled(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if owns(args[0].device_mesh) and _looks_into_none(operator, args, kwargs):
            return on_whole(operator, args, kwargs)
        return usual(operator, args, kwargs)

    return handled


def _looks_into_none(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether ``operator`` looks for an extreme, and a rank may have no number of an argument."""
    if operator in NORMS or operator is aten._foreach_norm.Scalar:
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        if not isinstance(order, (int, float)) or not (math.isinf(order) or order < 0):
            return False
    elif operator not in EXTREMES:
        return False
    return any(_may_be_none(leaf) for leaf in pytree.tree_leaves(args) if isinstance(leaf, DTensor))


def _may_be_none(tensor: DTensor) -> bool:
    """Whether the parts of ``tensor`` are so few that a rank may have none; the same on all ranks."""
    ranks: dict[int, int] = {}
    for placement, size in zip(tensor.placements, tensor.device_mesh.shape):
        dim = getattr(placement, "dim", None)  # of strided parts too
        if dim is not None:
            ranks[dim] = ranks.get(dim, 1) * size
    return any(-(-tensor.shape[dim] // count) * (count - 1) >= tensor.shape[dim] for dim, count in ranks.items())


def _of_finished(usual: Any, operator: Any, args: Any, kwargs: Any, op_info: Any, *rest: Any) -> Any:
    """What ``usual`` says of ``operator`` where its arguments are finished before; None: that it cannot be said."""
    given: OpSchema = op_info.schema
    in_args, in_kwargs = _specs(given.args_schema), _specs(given.kwargs_schema)
    if any(map(_is_unfinished, in_kwargs)):
        return None  # torch finishes arguments by position only
    if _keeps(operator, in_args):
        return usual(operator, args, kwargs, op_info, *rest)
    finished: Any = pytree.tree_map_only(DTensorSpec, _finished, given.args_schema)
    op_info.schema = OpSchema(operator, finished, given.kwargs_schema, schema_info=given.schema_info)
    try:
        found = usual(operator, args, kwargs, op_info, *rest)
        if not isinstance(found, OutputSharding):
            return found
        wanted = found.redistribute_schema or op_info.schema
        return replace(found, needs_redistribute=True, redistribute_schema=wanted)
    finally:
        op_info.schema = given


def _keeps(operator: Any, specs: Sequence[DTensorSpec]) -> bool:
    """Whether ``operator`` is right on arguments that are not finished."""
    unfinished = list(filter(_is_unfinished, specs))
    if not unfinished:
        return True
    if operator in NORMS:
        return all(type(one).__name__ == "_NormPartial" for one in unfinished[0].placements if one.is_partial())
    return operator in JOINING and all(spec.placements == specs[0].placements for spec in specs)


def _specs(schema: Any) -> list[DTensorSpec]:
    return [leaf for leaf in pytree.tree_leaves(schema) if isinstance(leaf, DTensorSpec)]


def _is_unfinished(spec: Any) -> bool:
    return any(placement.is_partial() for placement in spec.placements)


def _finished(spec: DTensorSpec) -> DTensorSpec:
    placements = tuple(Replicate() if one.is_partial() else one for one in spec.placements)
    return DTensorSpec(spec.mesh, placements, tensor_meta=spec.tensor_meta)
