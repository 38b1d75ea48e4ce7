"""Operators that rearrange elements: reshape, transpose, expand, slice, split, cat, pad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from autopar.layout import Placement, Split
from autopar.rules.factoring import Call, Dims, Factoring, Part, Shape, Strategy

aten = torch.ops.aten
_FIRST = (frozenset({0}),)  # a view is linear


def _plain(shape: Shape, names: Sequence[str]) -> Dims:
    return tuple((name,) if size != 1 else () for name, size in zip(names, shape))


def _names(shape: Shape) -> list[str]:
    return [f"d{i}" for i in range(len(shape))]


def _cut_sizes(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: int) -> tuple[Any, dict[str, Any]]:
    """Arguments of an operator whose second argument is the output's shape."""
    return (call.args[0], list(outputs[0]), *call.args[2:]), dict(call.kwargs)


def common_factors(source: Shape, target: Shape) -> tuple[list[list[int]], list[list[int]]] | None:
    """Sizes of the factors that two shapes with the same elements share, dim by dim; None where they do not nest.

    ``(4, 16, 8), (64, 8)`` -> ``[[4], [16], [8]], [[4, 16], [8]]``.
    """
    cuts = sorted(set(_cuts(source)) | set(_cuts(target)))
    if any(high % low for low, high in zip(cuts, cuts[1:])):
        return None
    return _pieces(source, cuts), _pieces(target, cuts)


def _cuts(shape: Shape) -> list[int]:
    cuts, inner = [1], 1
    for size in reversed(shape):
        inner *= size
        cuts.append(inner)
    return cuts


def _pieces(shape: Shape, cuts: list[int]) -> list[list[int]]:
    dims, inner = [], 1
    for size in reversed(shape):
        within = [cut for cut in cuts if inner <= cut <= inner * size]
        dims.append([high // low for low, high in zip(within, within[1:])][::-1])
        inner *= size
    return dims[::-1]


def reshape(call: Call) -> Factoring:
    """Both shapes as products of common factors: ``(b s) (h d) -> b s h d``. Groups that do not nest stay whole."""
    source, target = call.inputs[0], call.outputs[0]
    if math.prod(source) == 0 or (found := common_factors(source, target)) is None:
        return _opaque_reshape(call, source, target)
    sizes: dict[str, int] = {}
    return Factoring(
        (_numbered(found[0], sizes),),
        (_numbered(found[1], sizes),),
        sizes,
        linear=_FIRST,
        uneven=frozenset(sizes),
        localize=_cut_sizes,
    )


def _numbered(dims: list[list[int]], sizes: dict[str, int]) -> Dims:
    """Name factors by their position in the flat order of elements, so that both shapes name them alike."""
    named: list[tuple[str, ...]] = []
    inner = 1
    for dim in reversed(dims):
        names = []
        for size in reversed(dim):
            name = f"f{inner}"
            sizes[name] = size
            inner *= size
            names.append(name)
        named.append(tuple(reversed(names)))
    return tuple(reversed(named))


def _opaque_reshape(call: Call, source: Shape, target: Shape) -> Factoring:
    """Only equal leading dims may be split."""
    same = 0
    while same < min(len(source), len(target)) and source[same] == target[same]:
        same += 1
    sizes = {f"d{i}": source[i] for i in range(same)}
    sides = [
        tuple((f"d{i}",) if i < same and size != 1 else (f"{side}{i}",) if size != 1 else () for i, size in enumerate(s))
        for side, s in (("in", source), ("out", target))
    ]
    whole = {name for side in sides for dim in side for name in dim if not name.startswith("d")}
    sizes |= {name: 2 for name in whole}
    return Factoring((sides[0],), (sides[1],), sizes, whole=frozenset(whole), linear=_FIRST, localize=_cut_sizes)


def _permuted(call: Call, order: Sequence[int]) -> Factoring:
    shape = call.inputs[0]
    names = _names(shape)
    sizes = dict(zip(names, shape))
    dims = _plain(shape, names)
    return Factoring((dims,), (tuple(dims[i] for i in order),), sizes, linear=_FIRST, uneven=frozenset(names))


def transpose(call: Call) -> Factoring:
    order = list(range(len(call.inputs[0])))
    a, b = int(call.argument(1, "dim0")), int(call.argument(2, "dim1"))
    order[a], order[b] = order[b], order[a]
    return _permuted(call, order)


def permute(call: Call) -> Factoring:
    return _permuted(call, [d % len(call.inputs[0]) for d in call.argument(1, "dims")])


def swap_two(call: Call) -> Factoring:
    """``aten.t``: the two dims of a matrix change places."""
    return _permuted(call, list(range(len(call.inputs[0])))[::-1])


def unsqueeze(call: Call) -> Factoring:
    return _reinserted(call)


def _reinserted(call: Call) -> Factoring:
    """Dims of size 1 come or go; the others keep their order."""
    source, target = call.inputs[0], call.outputs[0]
    kept = [size for size in source if size != 1]
    assert kept == [size for size in target if size != 1], (source, target)
    names = [f"d{i}" for i in range(len(kept))]
    sides = []
    for shape in (source, target):
        left = iter(names)
        sides.append(tuple((next(left),) if size != 1 else () for size in shape))
    sizes = dict(zip(names, kept))
    return Factoring((sides[0],), (sides[1],), sizes, linear=_FIRST, uneven=frozenset(names))


def expand(call: Call) -> Factoring:
    """New dims, and dims of size 1 that grow, are factors that only the output has."""
    shape = call.outputs[0]
    names = _names(shape)
    offset = len(shape) - len(call.inputs[0])
    source = tuple((names[i + offset],) if size != 1 else () for i, size in enumerate(call.inputs[0]))
    return Factoring(
        (source,), (_plain(shape, names),), dict(zip(names, shape)), linear=_FIRST, localize=_cut_sizes
    )


def _keeps_other_dims(call: Call, touched: set[int]) -> Factoring:
    """All tensors have the same rank; the ``touched`` dims stay whole, the others are shared."""
    names = _names(call.outputs[0])
    sizes = {name: size for i, (name, size) in enumerate(zip(names, call.outputs[0])) if i not in touched}
    whole = {f"whole{i}" for i in touched}
    sizes |= {name: 2 for name in whole}

    def dims(shape: Shape) -> Dims:
        return tuple((f"whole{i}",) if i in touched else (n,) if s != 1 else () for i, (n, s) in enumerate(zip(names, shape)))

    return Factoring(
        tuple(map(dims, call.inputs)), tuple(map(dims, call.outputs)), sizes, whole=frozenset(whole), linear=_FIRST
    )


def slice_dim(call: Call) -> Factoring:
    dim = int(call.argument(1, "dim", 0)) % len(call.inputs[0])
    unchanged = call.inputs[0] == call.outputs[0] and call.argument(4, "step", 1) == 1
    return _keeps_other_dims(call, set() if unchanged else {dim})


def select(call: Call) -> Factoring:
    """One position of a dim: that dim stays whole and disappears."""
    shape = call.inputs[0]
    dim = int(call.argument(1, "dim", 0)) % len(shape)
    names = _names(shape)
    dims = tuple((name,) if size != 1 or i == dim else () for i, (name, size) in enumerate(zip(names, shape)))
    sizes = dict(zip(names, shape)) | {f"d{dim}": 2}
    return Factoring((dims,), (dims[:dim] + dims[dim + 1 :],), sizes, whole=frozenset({f"d{dim}"}), linear=_FIRST)


def pad(call: Call) -> Factoring:
    """Constant padding: dims that grow stay whole. A pending sum may pass where zeros are added."""
    amounts, rank = call.argument(1, "pad"), len(call.inputs[0])
    touched = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    value = call.argument(3, "value", 0) if call.target is aten.pad.default else call.argument(2, "value", 0)
    return replace(_keeps_other_dims(call, touched), linear=_FIRST if not value else ())


class Segments(Factoring):
    """A dim that is cut into (or joined from) segments of unequal size: split evenly inside each segment."""

    def splits(self, part: Part, tensor: Dims) -> list[Split]:
        found = super().splits(part, tensor)
        if part.factor != "segment" or tensor not in self.inputs:
            return found
        return [Split(split.dim, 1, self._ratio) for split in found]

    def part_of(self, tensor: Dims, split: Split, ways: int) -> Part | None:
        if tensor[split.dim] != ("segment",):
            return super().part_of(tensor, split, ways)
        wanted = Split(split.dim, 1, self._ratio) if tensor in self.inputs else Split(split.dim)
        return Part("segment") if split == wanted and self.allows(Part("segment"), ways) else None

    def allows(self, part: Part, ways: int) -> bool:
        if part.factor == "segment":
            return part == Part("segment") and all(size % ways == 0 for size in self._ratio)
        return super().allows(part, ways)

    @property
    def _ratio(self) -> tuple[int, ...]:
        return tuple(self.sizes[f"segment{i}"] for i in range(len(self.outputs)))


def split_dim(call: Call) -> Factoring:
    """``qkv.split([q, k, v], dim)``: equal parts are an outer factor; unequal ones are split each by itself."""
    shape = call.inputs[0]
    dim = int(call.argument(2, "dim", 0)) % len(shape)
    parts = [output[dim] for output in call.outputs]
    names = _names(shape)
    sizes = dict(zip(names, shape))
    plain = _plain(shape, names)

    def with_dim(factors: tuple[str, ...]) -> Dims:
        return (*plain[:dim], factors, *plain[dim + 1 :])

    if len(set(parts)) == 1:
        sizes |= {"part": len(parts), f"d{dim}": parts[0]}
        inner = (f"d{dim}",) if parts[0] != 1 else ()
        source, target = with_dim(("part", *inner)), with_dim(inner)
        whole = frozenset({"part"})
        return Factoring(
            (source,), (target,) * len(parts), sizes, whole=whole, linear=_FIRST, localize=_cut_segments
        )
    del sizes[f"d{dim}"]
    sizes |= {"segment": shape[dim]} | {f"segment{i}": size for i, size in enumerate(parts)}
    # input and outputs must differ as tuples so that Segments can tell them apart: the input has no other mark
    source = with_dim(("segment",))
    return _SplitSegments((source,), (source,) * len(parts), sizes, linear=_FIRST, localize=_cut_segments)


class _SplitSegments(Segments):
    """Segments where operand and results have the same factors: told apart by identity of the side."""

    def strategy(self, part: Part, ways: int) -> Strategy | None:
        found = super().strategy(part, ways)
        if found is None or part.factor != "segment":
            return found
        dim = next(i for i, factors in enumerate(self.inputs[0]) if factors == ("segment",))
        outputs: tuple[Placement, ...] = (Split(dim),) * len(self.outputs)
        return replace(found, outputs=outputs)

    def part_of(self, tensor: Dims, split: Split, ways: int) -> Part | None:
        if tensor[split.dim] != ("segment",):
            return Factoring.part_of(self, tensor, split, ways)
        known = split in (Split(split.dim), Split(split.dim, 1, self._ratio))
        return Part("segment") if known and self.allows(Part("segment"), ways) else None


def _cut_segments(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: int) -> tuple[Any, dict[str, Any]]:
    dim = int(call.argument(2, "dim", 0)) % len(call.inputs[0])
    parts = [shape[dim] for shape in outputs]
    sizes = parts if isinstance(call.argument(1, "split_size"), (list, tuple)) else parts[0]
    return (call.args[0], sizes, dim), {}


def concatenate(call: Call) -> Factoring:
    """Tensors joined along a dim: that dim is split only when all have the same size."""
    dim = int(call.argument(1, "dim", 0)) % len(call.outputs[0])
    shapes = {shape[dim] for shape in call.inputs}
    factoring = _keeps_other_dims(call, {dim})
    everything = (frozenset(range(len(call.inputs))),)
    if len(shapes) != 1 or shapes == {1}:
        return replace(factoring, linear=everything)
    name = f"whole{dim}"
    joined = tuple(("part", name) if factors == (name,) else factors for factors in factoring.outputs[0])
    sizes = {**factoring.sizes, "part": len(call.inputs), name: shapes.pop()}
    return Factoring(factoring.inputs, (joined,), sizes, whole=frozenset({"part"}), linear=everything)


def stack(call: Call) -> Factoring:
    dim = int(call.argument(1, "dim", 0)) % len(call.outputs[0])
    names = _names(call.inputs[0])
    dims = _plain(call.inputs[0], names)
    sizes = dict(zip(names, call.inputs[0])) | {"new": len(call.inputs)}
    output = (*dims[:dim], ("new",), *dims[dim:])
    everything = (frozenset(range(len(call.inputs))),)
    return Factoring((dims,) * len(call.inputs), (output,), sizes, whole=frozenset({"new"}), linear=everything)


def unbind(call: Call) -> Factoring:
    shape = call.inputs[0]
    dim = int(call.argument(1, "dim", 0)) % len(shape)
    names = _names(shape)
    dims = tuple((n,) if size != 1 or i == dim else () for i, (n, size) in enumerate(zip(names, shape)))
    sizes = dict(zip(names, shape)) | {f"d{dim}": 2}
    target = dims[:dim] + dims[dim + 1 :]
    return Factoring((dims,), (target,) * len(call.outputs), sizes, whole=frozenset({f"d{dim}"}), linear=_FIRST)


def along_dims(position: int, name: str, default: Any = None) -> Any:
    """Rule for an operator that works along the dims of one argument (flip, roll, cumsum): those stay whole."""

    def rule(call: Call) -> Factoring:
        dims = call.argument(position, name, default)
        rank = len(call.inputs[0])
        listed = range(rank) if dims in (None, []) else dims if isinstance(dims, (list, tuple)) else [dims]
        return _keeps_other_dims(call, {int(d) % rank for d in listed} if rank else set())

    return rule


def generated(call: Call) -> Factoring:
    """``new_zeros(x, sizes)``: the output's dims belong to no input."""
    names = _names(call.outputs[0])
    ignored = tuple(tuple((f"in{i}_{j}",) for j in range(len(shape))) for i, shape in enumerate(call.inputs))
    whole = {name for tensor in ignored for dim in tensor for name in dim}
    sizes = dict(zip(names, call.outputs[0])) | {name: 2 for name in whole}
    output = _plain(call.outputs[0], names)
    return Factoring(ignored, (output,), sizes, whole=frozenset(whole), localize=_cut_sizes)


RULES: dict[Any, Any] = {
    aten.reshape.default: reshape,
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.transpose.int: transpose,
    aten.permute.default: permute,
    aten.t.default: swap_two,
    aten.unsqueeze.default: _reinserted,
    aten.squeeze.dim: _reinserted,
    aten.squeeze.dims: _reinserted,
    aten.squeeze.default: _reinserted,
    aten.expand.default: expand,
    aten.slice.Tensor: slice_dim,
    aten.select.int: select,
    aten.split.Tensor: split_dim,
    aten.split_with_sizes.default: split_dim,
    aten.unbind.int: unbind,
    aten.cat.default: concatenate,
    aten.stack.default: stack,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.flip.default: along_dims(1, "dims"),
    aten.roll.default: along_dims(2, "dims"),
    aten.new_zeros.default: generated,
    aten.new_ones.default: generated,
    aten.new_full.default: generated,
    aten.new_empty.default: generated,
}
