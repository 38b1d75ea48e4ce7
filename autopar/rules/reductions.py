"""Sums, means, norms, softmax and other operators that combine elements along dims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autopar.ir import collectives as comm
from autopar.ir.layout import Factor, Layout, Split
from autopar.ir.node import Node, value
from autopar.ir.operator_facts import argument_names
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Emit, Factoring, Rewrite, dims_of
from autopar.rules.views import FIRST, along_dims

aten = torch.ops.aten


def reduction(call: Call, position: int = 1, default: int | None = None) -> Factoring:
    """Some dims (an argument at ``position``; all if there is none) are combined: they vanish, or have size 1."""
    shape = call.inputs[0]
    dims = call.argument(position, "dim", default)
    listed = range(len(shape)) if dims in (None, []) else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {int(d) % len(shape) for d in listed} if shape else set()
    source, sizes = dims_of(shape)
    kept = len(call.outputs[0]) == len(shape)
    target = tuple(() if i in gone else dim for i, dim in enumerate(source) if kept or i not in gone)
    return Factoring((source,), (target,) * len(call.outputs), sizes)


def _gone(factoring: Factoring) -> frozenset[str]:
    """The factors that are reduced."""
    return frozenset(f for f in factoring.sizes if all((f,) != dim for dim in factoring.outputs[0]))


def _kept(factoring: Factoring) -> frozenset[str]:
    return frozenset(factoring.sizes) - _gone(factoring)


def sum_dims(call: Call) -> Factoring:
    factoring = reduction(call)
    return replace(factoring, linear=FIRST, uneven=_kept(factoring))


def sum_all(call: Call) -> Factoring:
    return replace(_all(call), linear=FIRST)


def _all(call: Call) -> Factoring:
    """A reduction to one element, whatever its further arguments."""
    return reduction(replace(call, args=call.args[:1], kwargs={}))


def counted(call: Call) -> Factoring:
    """``count_nonzero, nansum``: the counts of parts add up, but a pending sum may not pass through."""
    return reduction(call)


def histogram(call: Call) -> Factoring:
    """Counts of all elements add up, where the bounds do not depend on the elements."""
    source, sizes = dims_of(call.inputs[0])
    low, high = call.argument(2, "min", 0), call.argument(3, "max", 0)
    whole = {"bins"} if low != high else {"bins", *sizes}
    return Factoring((source,), ((("bins",),),), sizes | {"bins": ANY_SIZE}, whole=frozenset(whole))


def mean_dims(call: Call) -> Factoring:
    """A mean: when an averaged dim is split, each rank's mean has the weight 1/n."""
    factoring = reduction(call) if call.target is aten.mean.dim else _all(call)
    shares = dict.fromkeys(_gone(factoring), share_of_mean)
    return replace(factoring, linear=FIRST, rewrites=shares, uneven=_kept(factoring))


def share_of_mean(emit: Emit, node: Node, axis: str, ways: int) -> Node:
    here = value(node)
    part = emit.partial(here, axis)
    own = emit(node.target, node.args, part, kwargs=node.kwargs)
    return emit(aten.div.Scalar, (own, ways), part)


def extremum(call: Call) -> Factoring:
    """max and min over dims: partial only where no gradient must find its way back to one element."""
    factoring = reduction(call)
    gone = _gone(factoring)
    if any(call.diff_inputs):
        return replace(factoring, whole=gone)
    return replace(factoring, reduce=dict.fromkeys(gone, "max" if "max" in _name(call) else "min"))


def combined(position: int | None = 1, default: int | None = None) -> Any:
    """Rule for a reduction that cannot be completed from parts (var, argmax, median): its dims stay whole."""

    def rule(call: Call) -> Factoring:
        factoring = _all(call) if position is None else reduction(call, position, default)
        return replace(factoring, whole=_gone(factoring))

    return rule


def of_results(position: int | None, again: Any) -> Any:
    """Rule for a reduction whose results can be reduced again: a norm of norms, a product of products.

    ``again(node)`` gives the operator that combines them along dim 0, and its arguments after the tensor.
    """

    def finish(emit: Emit, node: Node, axis: str, ways: int) -> Node:
        whole = value(node)
        own = emit(node.target, node.args, whole, kwargs=node.kwargs)
        row = replace(whole, layout=Layout(((Factor(ways, (axis,)),), *whole.layout.dims)))
        rows = replace(whole, layout=Layout(((Factor(ways),), *whole.layout.dims)))
        lifted = emit(aten.unsqueeze.default, (own, 0), row)
        where = comm.where(Split(0), axis, ways, ways)
        joined = emit(comm.OPS.all_gather_invariant.default, (lifted, *where), rows)
        target, arguments = again(node)
        return emit(target, (joined, *arguments), whole)

    return _finished(position, finish)


def flags(op: str) -> Any:
    """Rule for ``any`` and ``all``: the largest, or the smallest, of the ranks' flags."""

    def finish(emit: Emit, node: Node, axis: str, ways: int) -> Node:
        whole = value(node)
        own = emit(node.target, node.args, whole, kwargs=node.kwargs)
        part = emit.partial(replace(whole, dtype=torch.uint8), axis, op)
        number = emit(aten._to_copy.default, (own,), part, kwargs={"dtype": torch.uint8})
        return emit(aten.ne.Scalar, (emit.all_reduce(number, axis, op), 0), whole)

    return _finished(1, finish)


def _finished(position: int | None, finish: Rewrite) -> Any:
    """Rule for a reduction that ``finish`` computes from parts; the result is the same on every rank."""

    def rule(call: Call) -> Factoring:
        over_all = position is None or "dim" not in argument_names(call.target)
        factoring = _all(call) if over_all else reduction(call, position or 1)
        gone = _gone(factoring)
        return replace(factoring, reduce=dict.fromkeys(gone, "whole"), rewrites=dict.fromkeys(gone, finish))

    return rule


def norm(position: int | None) -> Any:
    """Rule for vector norms; a count of nonzero elements (the 0-norm) is a sum."""
    joined = of_results(position, lambda node: (aten.linalg_vector_norm.default, (_order(node.args), [0])))

    def rule(call: Call) -> Factoring:
        factoring: Factoring = joined(call)
        return factoring if _order(call.args) else replace(factoring, reduce={}, rewrites={})

    return rule


def _order(args: tuple[Any, ...]) -> Any:
    order = args[1] if len(args) > 1 else None
    return 2 if order is None else order


def compared(position: int, default: int) -> Any:
    """Rule for two tensors that are combined along a dim (cosine_similarity): the dim stays whole and vanishes."""

    def rule(call: Call) -> Factoring:
        rank = max(map(len, call.inputs))
        dim = int(call.argument(position, "dim", default)) % rank
        kept = len(call.outputs[0]) == rank
        sizes = {f"d{i}": max(s[i - rank + len(s)] for s in call.inputs if i - rank + len(s) >= 0) for i in range(rank)}

        def dims(shape: tuple[int, ...]) -> Dims:
            offset = rank - len(shape)
            return tuple((f"d{i + offset}",) if size != 1 else () for i, size in enumerate(shape))

        full = tuple((name,) if size != 1 else () for name, size in sizes.items())
        target = (*full[:dim], *(((),) if kept else ()), *full[dim + 1 :])
        inputs = tuple(map(dims, call.inputs))
        return Factoring(inputs, (target,) * len(call.outputs), sizes, whole=frozenset({f"d{dim}"}))

    return rule


def distances(call: Call) -> Factoring:
    """``cdist``: (..., P, M), (..., R, M) -> (..., P, R)."""
    lead, sizes = dims_of(call.outputs[0][:-2], "b")

    def dims(shape: tuple[int, ...], *names: str) -> Dims:
        batch = lead[len(lead) - (len(shape) - 2) :]
        named = tuple(factors if size != 1 else () for factors, size in zip(batch, shape))
        return (*named, *((name,) for name in names))

    first, second = call.inputs
    sizes |= {"p": first[-2], "r": second[-2], "m": first[-1]}
    inputs = (dims(first, "p", "m"), dims(second, "r", "m"))
    return Factoring(inputs, (dims(call.outputs[0], "p", "r"),), sizes, whole=frozenset({"m"}))


def _name(call: Call) -> str:
    return str(call.target).split(".")[1]


def normalised(call: Call) -> Factoring:
    """layer_norm, rms_norm: the last dims are normalised together; weight and bias have these dims."""
    lead = len(call.inputs[0]) - len(call.argument(1, "normalized_shape"))
    dims, sizes = dims_of(call.inputs[0])
    inputs = (dims, *[dims[lead:]] * (len(call.inputs) - 1))
    return Factoring(inputs, (dims,), sizes, whole=frozenset(list(sizes)[lead:]))


def weight_norm(call: Call) -> Factoring:
    """``v * (g / norm(v))`` with the norm over all dims but one."""
    dims, sizes = dims_of(call.inputs[0])
    dim = int(call.argument(2, "dim", 0)) % len(dims)
    sides = [tuple(factors if size != 1 else () for factors, size in zip(dims, shape)) for shape in call.inputs]
    return Factoring(tuple(sides), (dims,), sizes, whole=frozenset(sizes) - {f"d{dim}"})


_OVER_DIMS = (
    aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.var.correction, aten.var.dim,
    aten.std.correction, aten.std.dim, aten.var_mean.correction, aten.var_mean.dim, aten.std_mean.correction,
    aten.std_mean.dim, aten.median.dim, aten.nanmedian.dim, aten.nanmean.default, aten.aminmax.default,
)  # fmt: skip
_OVER_ALL = (
    aten.var.default, aten.std.default, aten.var_mean.default, aten.median.default, aten.nanmedian.default,
)  # fmt: skip
_ALONG = (
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default, aten.cumprod.default,
    aten.cummax.default, aten.cummin.default, aten.logcumsumexp.default,
    aten._safe_softmax.default,
)  # fmt: skip

RULES: dict[Any, Any] = {
    aten.sum.default: sum_all,
    aten.sum.dim_IntList: sum_dims,
    aten.mean.default: mean_dims,
    aten.mean.dim: mean_dims,
    **dict.fromkeys((aten.amax.default, aten.amin.default, aten.max.default, aten.min.default), extremum),
    **dict.fromkeys(_OVER_DIMS, combined()),
    **dict.fromkeys(_OVER_ALL, combined(None)),
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.any.dims), flags("max")),
    **dict.fromkeys((aten.all.default, aten.all.dim, aten.all.dims), flags("min")),
    **dict.fromkeys((aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), norm(2)),
    aten.norm.Scalar: norm(None),
    aten.logsumexp.default: of_results(1, lambda node: (aten.logsumexp.default, ([0],))),
    aten.prod.default: of_results(None, lambda node: (aten.prod.dim_int, (0,))),
    aten.prod.dim_int: of_results(1, lambda node: (aten.prod.dim_int, (0,))),
    aten.nansum.default: counted,
    aten.mode.default: combined(1, -1),
    aten.kthvalue.default: combined(2, -1),
    aten.quantile.scalar: combined(2),
    aten.count_nonzero.dim_IntList: counted,
    aten.count_nonzero.default: counted,
    aten.histc.default: histogram,
    **dict.fromkeys(_ALONG, along_dims(1, "dim")),
    aten.topk.default: along_dims(2, "dim", -1),
    aten.sort.default: along_dims(1, "dim", -1),
    aten.sort.stable: along_dims(99, "dim", -1),
    aten.argsort.default: along_dims(1, "dim", -1),
    aten.layer_norm.default: normalised,
    aten.rms_norm.default: normalised,
    aten._weight_norm.default: weight_norm,
    aten.cosine_similarity.default: compared(2, 1),
    aten.linalg_cross.default: along_dims(99, "dim", -1),
    aten.cdist.default: distances,
}
