"""Operators that pick or write elements by position: gather, index, scatter, one_hot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autopar.rules.at_dim import at_end
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Factoring, Shape, dims_of
from autopar.rules.views import FIRST, keeps_other_dims

aten = torch.ops.aten


def gather(call: Call) -> Factoring:
    """``x.gather(dim, index)``: dims other than ``dim`` are shared where the index covers them whole."""
    source, index = call.inputs
    dim = int(call.argument(1, "dim")) % len(source) if source else 0
    rows, picks, sizes, whole = _aligned(source, index, dim)
    return Factoring((rows, picks), (picks,), sizes, whole=whole, linear=FIRST)


def _aligned(source: Shape, index: Shape, dim: int) -> tuple[Dims, Dims, dict[str, int], frozenset[str]]:
    """The dims of a tensor and of an index into its ``dim``; dims that the index covers only in part stay whole."""
    shared = [i != dim and source[i] == index[i] for i in range(len(source))]
    rows = tuple((f"d{i}",) if size != 1 or not shared[i] else () for i, size in enumerate(source))
    picks = tuple(rows[i] if shared[i] else (f"p{i}",) for i in range(len(index)))
    sizes = {f"d{i}": size if shared[i] else 2 for i, size in enumerate(source)}
    sizes |= {f"p{i}": index[i] for i in range(len(index)) if not shared[i]}
    apart = [i for i in range(len(source)) if not shared[i]]
    whole = {f"d{i}" for i in apart} | {f"p{i}" for i in apart if i != dim}
    return rows, picks, sizes, frozenset(whole)


def scatter(call: Call) -> Factoring:
    """``x.scatter(dim, index, src)``: of several writes to one place one counts, so the written values stay whole."""
    return _scattered(call, adds=False)


def scatter_add(call: Call) -> Factoring:
    """Writes that are added: when split, each rank adds up its own."""
    return _scattered(call, adds=True)


def _scattered(call: Call, adds: bool) -> Factoring:
    source, index, *written = call.inputs
    dim = int(call.argument(1, "dim")) % len(source) if source else 0
    rows, picks, sizes, whole = _aligned(source, index, dim)
    covers = all(shape == index for shape in written)
    linear = (frozenset({0, 2}),) if written and str(call.target) in _LINEAR_SCATTERS else ()
    if not written and call.argument(3, "value") == 0:
        linear = FIRST
    if not covers:  # the index may be smaller than what is written
        sources = tuple(tuple((f"s{i}",) for i in range(len(shape))) for shape in written)
        names = frozenset(sizes) | {f"s{i}" for i in range(len(source))}
        return Factoring((rows, picks, *sources), (rows,), dict.fromkeys(names, ANY_SIZE), whole=names, linear=linear)
    whole = whole if adds else whole | {f"p{dim}"}
    inputs = (rows, picks, *[picks] * len(written))
    return Factoring(inputs, (rows,), sizes, whole=whole, linear=linear, added=frozenset({0}) if adds else frozenset())


_LINEAR_SCATTERS = ("aten.scatter.src", "aten.scatter_add.default")


def index(call: Call) -> Factoring:
    """``x[i, :, j]``: indexed dims stay whole, the others and the dims of the (broadcast) indices may be split."""
    rows, slots, target, sizes, whole = _indexed(call.inputs[0], call.args[1], call.inputs[1:])
    return Factoring((rows, *slots), (target,), sizes, whole=whole, linear=FIRST)


def index_put(call: Call) -> Factoring:
    """``x[i, :, j] = v``, or ``+= v``: then the dims of the indices may be split."""
    adds = bool(call.argument(3, "accumulate", False))
    values = call.inputs[-1]
    rows, slots, target, sizes, whole = _indexed(call.inputs[0], call.args[1], call.inputs[1:-1])
    aligned = target[len(target) - len(values) :]
    written = tuple(factors if size != 1 else () for factors, size in zip(aligned, values))
    if not adds:
        whole |= {f for slot in slots for dim in slot for f in dim}
    linear = (frozenset({0, len(call.inputs) - 1}),)
    added = frozenset({0}) if adds else frozenset()
    return Factoring((rows, *slots, written), (rows,), sizes, whole=whole, linear=linear, added=added)


def _indexed(
    source: Shape, slots: Any, shapes: tuple[Shape, ...]
) -> tuple[Dims, tuple[Dims, ...], Dims, dict[str, int], frozenset[str]]:
    """The dims of the tensor, of each index and of ``x[indices]``; all sizes; the factors that stay whole."""
    positions = [i for i, slot in enumerate(slots) if slot is not None]
    result = tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    dims, sizes = dims_of(source)
    rows = tuple((f"d{i}",) if i in positions else factors for i, factors in enumerate(dims))
    whole = frozenset(f"d{i}" for i in positions)
    sizes |= {f"i{len(result) - k}": size for k, size in enumerate(result)} | dict.fromkeys(whole, ANY_SIZE)

    def of_index(shape: Shape) -> Dims:
        return tuple((f"i{len(shape) - k}",) if size != 1 else () for k, size in enumerate(shape))

    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    first = positions[0] if adjacent else 0
    kept = [row for i, row in enumerate(rows) if i not in positions]
    return rows, tuple(map(of_index, shapes)), (*kept[:first], *of_index(result), *kept[first:]), sizes, whole


def index_select(call: Call) -> Factoring:
    dims, sizes = dims_of(call.inputs[0])
    dim = int(call.argument(1, "dim")) % len(dims)
    sizes |= {f"d{dim}": ANY_SIZE, "picked": call.outputs[0][dim]}
    picked = (("picked",),) if call.inputs[1] else ()
    rows = (*dims[:dim], (f"d{dim}",), *dims[dim + 1 :])
    target = (*dims[:dim], ("picked",), *dims[dim + 1 :])
    return Factoring((rows, picked), (target,), sizes, whole=frozenset({f"d{dim}"}), linear=FIRST)


def index_write(call: Call) -> Factoring:
    """``index_add, index_copy, index_fill (x, dim, index, ...)``: additions may be split, other writes not."""
    source, picked, *written = call.inputs if call.target is not aten.index_fill.int_Tensor else call.inputs[:2]
    dims, sizes = dims_of(source)
    dim = int(call.argument(1, "dim")) % len(dims)
    rows = (*dims[:dim], (f"d{dim}",), *dims[dim + 1 :])
    adds = call.target is aten.index_add.default
    sizes |= {f"d{dim}": ANY_SIZE, "picked": picked[0] if picked else 1}
    place = ("picked",)
    inputs = (rows, (place,) if picked else (), *[(*dims[:dim], place, *dims[dim + 1 :])] * len(written))
    inputs += ((),) * (len(call.inputs) - len(inputs))  # what is filled in, a number
    return Factoring(
        inputs,
        (rows,),
        sizes,
        whole=frozenset({f"d{dim}"} | (set() if adds else {"picked"})),
        linear=(frozenset({0, 2}),) if written and call.target is not aten.index_reduce.default else (),
        added=frozenset({0}) if adds else frozenset(),
    )


def looked_up(first: int) -> Any:
    """Rule for ``bucketize, searchsorted, isin``: each element is looked up in a table that stays whole."""

    def rule(call: Call) -> Factoring:
        table = call.inputs[1 - first]
        dims, sizes = dims_of(call.inputs[first])
        if len(table) > 1:  # one table for each row
            return replace(keeps_other_dims(call, {len(table) - 1}), linear=())
        entries = tuple(("entry",) for _ in table)
        inputs = (dims, entries) if first == 0 else (entries, dims)
        return Factoring(inputs, (dims,), sizes | {"entry": ANY_SIZE}, whole=frozenset({"entry"}))

    return rule


def take(call: Call) -> Factoring:
    """``x.take(index)``: positions in all of x, which stays whole."""
    source, picks = call.inputs
    dims, sizes = dims_of(picks)
    names = [f"x{i}" for i in range(len(source))]
    whole = frozenset(names)
    rows = tuple((name,) for name in names)
    return Factoring((rows, dims), (dims,), sizes | dict.fromkeys(names, ANY_SIZE), whole=whole, linear=FIRST)


_WRITES = (
    aten.index_add.default, aten.index_copy.default, aten.index_fill.int_Scalar, aten.index_fill.int_Tensor,
    aten.index_reduce.default,
)  # fmt: skip

RULES: dict[Any, Any] = {
    aten.gather.default: gather,
    aten.scatter.src: scatter,
    aten.scatter.value: scatter,
    **dict.fromkeys((aten.scatter_reduce.two, aten.scatter.reduce, aten.scatter.value_reduce), scatter),
    aten.scatter_add.default: scatter_add,
    **dict.fromkeys((aten.index.Tensor, aten._unsafe_index.Tensor), index),
    **dict.fromkeys((aten.index_put.default, aten._unsafe_index_put.default), index_put),
    aten.index_select.default: index_select,
    **dict.fromkeys(_WRITES, index_write),
    aten.take.default: take,
    aten.one_hot.default: at_end(" -> classes"),
    aten.bucketize.Tensor: looked_up(0),
    aten.searchsorted.Tensor: looked_up(1),
    aten.isin.Tensor_Tensor: looked_up(0),
}
