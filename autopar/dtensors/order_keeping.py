"""Operators that may compute on tensors in a stored order: those that treat each number alone, or add all of them."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.dtensors.dtensor import local_of, of_local, spec_of
from autopar.dtensors.placements import orders, plain

aten = torch.ops.aten
ALONE = {  # each number alone, besides what torch tags as pointwise
    *(aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default, aten.lift_fresh.default),
    *(aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default),
    *(aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default),
    *(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    aten.new_empty_strided.default,
    *(aten.is_same_size.default, aten.is_pinned.default, aten.equal.default),
    aten._amp_foreach_non_finite_check_and_unscale_.default,
}
ALL = {  # all numbers, in any order
    *(aten.sum.default, aten.mean.default, aten.prod.default, aten.max.default, aten.min.default),
    *(aten.any.default, aten.all.default, aten.norm.Scalar, aten.linalg_vector_norm.default),
}
SAME_SIZE = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
FOREACH = ("_foreach_", "_fused_", "_amp_foreach_")


def keeps_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func`` of tensors in the stored order is the result in the stored order, or does not depend on it."""
    if func in SAME_SIZE:
        return tuple(args[1]) == tuple(args[0].shape)
    if func in ALL:
        return len(args) < 3 or not args[2] or len(args[2]) == args[0].dim()
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    if not (func in ALONE or torch.Tag.pointwise in func.tags or _is_foreach(func)):
        return False
    return all(_agree(func, together) for together in _together(func, args, kwargs))


def _is_foreach(func: Any) -> bool:
    return bool(func._schema.name.rpartition("::")[2].startswith(FOREACH))


def _together(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[list[Tensor]]:
    """The tensors that ``func`` computes with one another: those at one place of its lists, or all."""
    given = [*args, *kwargs.values()]
    if not _is_foreach(func):
        return [[leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]]
    lists = [one for one in given if isinstance(one, list | tuple) and any(isinstance(item, Tensor) for item in one)]
    alone = [one for one in given if isinstance(one, Tensor)]
    return [[*together, *alone] for together in zip(*lists)]


def _is_ordered(tensor: Any) -> TypeGuard[DTensor]:
    """Whether it is piecewise."""
    return isinstance(tensor, DTensor) and type(tensor) is not DTensor and hasattr(spec_of(tensor), "plain")


def _agree(func: Any, together: list[Tensor]) -> bool:
    """Whether all are in one order, or have no more than one number along the dims that are in another."""
    ordered: list[DTensor] = [tensor for tensor in together if _is_ordered(tensor)]
    if not ordered:
        return True
    first, *others = ordered
    if any(one.shape != first.shape or spec_of(one).placements != spec_of(first).placements for one in others):
        return False
    dims = [dim - first.dim() for dim in orders(spec_of(first).placements)]
    rest = [tensor for tensor in together if not _is_ordered(tensor)]
    in_place = not _is_foreach(func) and func._schema.name.endswith("_") and _is_ordered(together[0])
    reorders = in_place or not func._schema.is_mutable  # a copy in the stored order is only read
    return all((reorders and _is_everywhere(tensor, first)) or _broadcasts(tensor, first, dims) for tensor in rest)


def _is_everywhere(tensor: Tensor, like: DTensor) -> TypeGuard[DTensor]:
    """Whether all ranks have the whole ``tensor``, which is as large as ``like``."""
    if not isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return False
    return all(placement.is_replicate() for placement in tensor.placements)


def _stored(together: list[Tensor]) -> list[Tensor]:
    """All as ordinary DTensors, in the stored order of those that have one."""
    like: DTensor | None = next((tensor for tensor in together if _is_ordered(tensor)), None)
    return together if like is None else [_stored_like(tensor, like) for tensor in together]


def _stored_like(tensor: Tensor, like: DTensor) -> Tensor:
    if _is_ordered(tensor):
        return of_local(local_of(tensor), spec_of(tensor).plain)
    if not _is_everywhere(tensor, like):
        return tensor
    local = local_of(tensor)
    for dim, order in orders(spec_of(like).placements).items():
        local = local.index_select(dim, order.to(local.device))
    return of_local(local, spec_of(tensor))


def _broadcasts(tensor: Tensor, to: Tensor, dims: list[int]) -> bool:
    sizes = [1] * (to.dim() - tensor.dim()) + list(tensor.shape)
    fits = len(sizes) == to.dim() and all(size in (1, full) for size, full in zip(sizes, to.shape))
    return fits and all(sizes[dim] == 1 for dim in dims)


def in_stored_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``func``, computed by each rank on its part."""
    groups = _together(func, args, kwargs)
    inner = {id(tensor): found for group in groups for tensor, found in zip(group, _stored(group))}
    given = {id(found): tensor for group in groups for tensor in group if (found := inner[id(tensor)]) is not tensor}
    plain_args, plain_kwargs = pytree.tree_map_only(Tensor, lambda leaf: inner.get(id(leaf), leaf), (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if isinstance(result, list | tuple) and len(result) == len(groups):
        return type(result)(_ordered(one, given, group) for one, group in zip(result, groups))
    return _ordered(result, given, groups[0]) if isinstance(result, Tensor) else result


def _ordered(result: Tensor, given: dict[int, Tensor], together: list[Tensor]) -> Tensor:
    """The result as what it is: one of the arguments, in their order, or in no order."""
    if id(result) in given:
        return given[id(result)]
    like: DTensor | None = next((tensor for tensor in together if _is_ordered(tensor)), None)
    if like is None or not isinstance(result, DTensor) or result.shape != like.shape:
        return result
    spec = spec_of(like)
    assert spec_of(result).placements == plain(spec.placements), (spec, spec_of(result))
    return of_local(local_of(result), spec.like(spec_of(result)))
