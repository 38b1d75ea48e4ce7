"""Sums, means, norms, softmax and other operators that combine elements along dims."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autopar.program import Node, value
from autopar.rules.factoring import Call, Dims, Emit, Factoring
from autopar.rules.views import along_dims

aten = torch.ops.aten


def _reduced_dims(call: Call, position: int = 1, name: str = "dim") -> list[int]:
    rank = len(call.inputs[0])
    dims = call.argument(position, name)
    listed = range(rank) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    return [int(d) % rank for d in listed] if rank else []


def reduction(call: Call) -> Factoring:
    """Some dims are combined and vanish, or stay with size 1."""
    shape = call.inputs[0]
    gone = _reduced_dims(call)
    names = [f"d{i}" for i in range(len(shape))]
    source: Dims = tuple((name,) if size != 1 else () for name, size in zip(names, shape))
    kept = len(call.outputs[0]) == len(shape)
    target = tuple(() if i in gone else dim for i, dim in enumerate(source) if kept or i not in gone)
    sizes = dict(zip(names, shape))
    return Factoring((source,), (target,) * len(call.outputs), sizes, uneven=frozenset(n for i, n in enumerate(names) if i not in gone))


def sum_dims(call: Call) -> Factoring:
    return replace(reduction(call), linear=(frozenset({0}),))


def mean_dims(call: Call) -> Factoring:
    """Split along a dim that is averaged, each rank's mean counts 1/n."""
    factoring = reduction(call)
    gone = {f"d{i}" for i in _reduced_dims(call)}
    return replace(factoring, linear=(frozenset({0}),), rewrites=dict.fromkeys(gone, _share_of_mean))


def _share_of_mean(emit: Emit, node: Node, axis: str, ways: int) -> Node:
    here = value(node)
    part = emit.partial(here, axis)
    own = emit(node.target, node.args, part)
    return emit(aten.div.Scalar, (own, ways), part)


def extremum(call: Call) -> Factoring:
    """max, min, any, all over dims: partial only where no gradient must find its way back to one element."""
    factoring = reduction(call)
    op = {"amax": "max", "amin": "min", "any": "max", "all": "min", "max": "max", "min": "min"}.get(_name(call))
    gone = frozenset(f"d{i}" for i in _reduced_dims(call))
    if op is None or any(call.diff_inputs) or len(call.outputs) > 1 or _name(call) in ("any", "all"):
        return replace(factoring, whole=gone)
    return replace(factoring, reduce=dict.fromkeys(gone, op))


def combines(call: Call) -> Factoring:
    """A reduction that cannot be finished from parts (var, argmax, median): its dims stay whole."""
    gone = frozenset(f"d{i}" for i in _reduced_dims(call))
    return replace(reduction(call), whole=gone)


def _name(call: Call) -> str:
    return str(call.target).split(".")[1]


def normalised(call: Call) -> Factoring:
    """layer_norm, rms_norm: the last dims are normalised together, weight and bias lie along them."""
    count = len(call.argument(1, "normalized_shape"))
    shape = call.inputs[0]
    names = [f"d{i}" for i in range(len(shape))]
    dims: Dims = tuple((name,) if size != 1 else () for name, size in zip(names, shape))
    return Factoring(
        (dims, *[dims[len(shape) - count :]] * (len(call.inputs) - 1)),
        (dims,),
        dict(zip(names, shape)),
        whole=frozenset(names[len(shape) - count :]),
    )


def group_norm(call: Call) -> Factoring:
    """(N, C, ...): only the batch may be split (channels by whole groups would need uneven arguments)."""
    shape = call.inputs[0]
    names = [f"d{i}" for i in range(len(shape))]
    dims: Dims = tuple((name,) if size != 1 or i == 1 else () for i, (name, size) in enumerate(zip(names, shape)))
    weights = [(dims[1],)] * (len(call.inputs) - 1)
    return Factoring((dims, *weights), (dims,), dict(zip(names, shape)), whole=frozenset(names[1:]))


def pooled(call: Call) -> Factoring:
    """Pooling: batch and channels may be split, positions not."""
    shape, result = call.inputs[0], call.outputs[0]
    spatial = 1 if "1d" in _name(call) else 3 if "3d" in _name(call) else 2
    lead = len(shape) - spatial
    names = [f"d{i}" for i in range(len(shape))]
    source: Dims = tuple((n,) if s != 1 else () for n, s in zip(names, shape))
    target = (*source[:lead], *[(f"o{i}",) if size != 1 else () for i, size in enumerate(result[lead:])])
    sizes = dict(zip(names, shape)) | {f"o{i}": size for i, size in enumerate(result[lead:])}
    whole = frozenset(names[lead:]) | {f"o{i}" for i in range(spatial)}
    return Factoring((source,), (target,) * len(call.outputs), sizes, whole=whole)


def batch_statistics(call: Call) -> Factoring:
    """Evaluation-mode batch_norm: running statistics are given, every dim but the channel is independent."""
    shape = call.inputs[0]
    names = [f"d{i}" for i in range(len(shape))]
    dims: Dims = tuple((name,) if size != 1 else () for name, size in zip(names, shape))
    channel = (dims[1],)
    return Factoring((dims, *[channel] * (len(call.inputs) - 1)), (dims,), dict(zip(names, shape)))


def with_values(call: Call) -> Factoring:
    """topk, sort, cummax: values and indices; the dim stays whole."""
    position = 2 if _name(call) == "topk" else 1
    return along_dims(position, "dim", -1)(call)


RULES: dict[Any, Any] = {
    aten.sum.default: sum_dims,
    aten.sum.dim_IntList: sum_dims,
    aten.mean.default: mean_dims,
    aten.mean.dim: mean_dims,
    **dict.fromkeys((aten.amax.default, aten.amin.default, aten.max.default, aten.min.default), extremum),
    **dict.fromkeys((aten.any.default, aten.any.dim, aten.all.default, aten.all.dim), extremum),
    **dict.fromkeys((aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default), combines),
    **dict.fromkeys((aten.prod.default, aten.var.correction, aten.std.correction, aten.logsumexp.default), combines),
    **dict.fromkeys((aten.var.dim, aten.linalg_vector_norm.default), combines),
    aten.softmax.int: along_dims(1, "dim"),
    aten._softmax.default: along_dims(1, "dim"),
    aten.log_softmax.int: along_dims(1, "dim"),
    aten._log_softmax.default: along_dims(1, "dim"),
    aten.cumsum.default: along_dims(1, "dim"),
    aten.cumprod.default: along_dims(1, "dim"),
    aten.topk.default: with_values,
    aten.sort.default: with_values,
    aten.layer_norm.default: normalised,
    aten.rms_norm.default: normalised,
    aten.group_norm.default: group_norm,
    aten._native_batch_norm_legit_no_training.default: batch_statistics,
    **dict.fromkeys(
        (aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.avg_pool1d.default),
        pooled,
    ),
}
