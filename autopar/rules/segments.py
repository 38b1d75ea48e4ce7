"""Operators that cut a dim into segments or join segments: slice, split, cat, stack, select, pad."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from autopar.ir.layout import Placement, Split
from autopar.rules.at_dim import at_dim
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Factoring, Part, Shape, Strategy, Ways, dims_of
from autopar.rules.views import FIRST, keeps_other_dims

aten = torch.ops.aten
Local = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Windows(Factoring):
    """One tensor has a dim ``joined`` of which others have windows (start, stop): ``window0, window1, ...``.

    A part is a split of ``joined`` in which every window consists of whole segments; a window's own split is that of
    its segments. So ``qkv[..., :q]`` and ``qkv[..., q:]`` agree on ``Split(2, ratio=(q, k, v))``.
    """

    windows: tuple[tuple[int, int], ...] = ()

    def _of_window(self, part: Part, number: int, dim: int, ways: int) -> Split | None:
        start, stop = self.windows[number]
        inside, at = [], 0
        for size in _segments(self.sizes["joined"], part):
            if start < at + size and at < stop:
                if at < start or at + size > stop or size % ways:
                    return None
                inside.append(size)
            at += size
        return Split(dim, 1, tuple(inside)) if inside else None

    def _of_joined(self, split: Split, number: int) -> Part | None:
        """The split of the joined dim in which one window is split as given and all else evenly."""
        length = self.sizes["joined"]
        start, stop = self.windows[number]
        if not split.divides(stop - start, 1):
            return None
        inner = _segments(stop - start, Part("joined", split.outer, split.ratio))
        edges = {0, length, *(edge for window in self.windows for edge in window)}
        cuts = sorted(edge for edge in edges if edge <= start or edge >= stop)
        sizes = [high - low for low, high in zip(cuts, cuts[1:])]
        at = cuts.index(start)
        whole = Split(0, 1, (*sizes[:at], *inner, *sizes[at + 1 :]))
        return Part("joined", whole.outer, whole.ratio)

    def part_of(self, tensor: Dims, split: Split, ways: int) -> Part | None:
        factors = tensor[split.dim]
        part: Part | None
        if split.mirrored and factors and (factors == ("joined",) or factors[0].startswith("window")):
            return None
        if factors == ("joined",):
            part = Part("joined", split.outer, split.ratio)
        elif factors and factors[0].startswith("window"):
            part = self._of_joined(split, int(factors[0].removeprefix("window")))
        else:
            return super().part_of(tensor, split, ways)
        return part if part and self.strategy(part, ways) else None

    def strategy(self, part: Part, ways: int) -> Strategy | None:
        if part.factor != "joined":
            return super().strategy(part, ways)
        if not self.allows(part, ways):
            return None
        sides: list[tuple[Placement, ...]] = []
        for tensors in (self.inputs, self.outputs):
            found = [self._placed(part, tensor, ways) for tensor in tensors]
            if None in found:
                return None
            sides.append(tuple(placement for placement in found if placement))
        return Strategy(str(part), sides[0], sides[1], part, 1.0 / ways)

    def _placed(self, part: Part, tensor: Dims, ways: int) -> Placement | None:
        for dim, factors in enumerate(tensor):
            if factors == ("joined",):
                return Split(dim, part.outer, part.ratio)
            if factors and factors[0].startswith("window"):
                return self._of_window(part, int(factors[0].removeprefix("window")), dim, ways)
        raise AssertionError(tensor)


def _segments(length: int, part: Part) -> list[int]:
    unit = length // part.outer // sum(part.ratio)
    return [share * unit for _ in range(part.outer) for share in part.ratio]


def _windows(shape: Shape, dim: int, bounds: list[tuple[int, int]]) -> tuple[Dims, tuple[Dims, ...], dict[str, int]]:
    """The joined tensor, its windows and all sizes."""
    dims, sizes = dims_of(shape)
    del sizes[f"d{dim}"]
    sizes |= {"joined": shape[dim]} | {f"window{i}": stop - start for i, (start, stop) in enumerate(bounds)}
    joined = (*dims[:dim], ("joined",), *dims[dim + 1 :])
    return joined, tuple((*dims[:dim], (f"window{i}",), *dims[dim + 1 :]) for i in range(len(bounds))), sizes


def _window_names(bounds: list[tuple[int, int]]) -> frozenset[str]:
    return frozenset(f"window{i}" for i in range(len(bounds)))


def _others(dims: Dims, dim: int) -> frozenset[str]:
    """The factors of the other dims, which may be padded: nothing is computed from them."""
    return frozenset(f for i, factors in enumerate(dims) if i != dim for f in factors)


def slice_dim(call: Call) -> Factoring:
    """``x[a:b]`` is a window; ``x[a::n]`` takes one element of each group of n; otherwise the dim stays whole."""
    shape = call.inputs[0]
    dim = int(call.argument(1, "dim", 0)) % len(shape)
    bounds = slice(call.argument(2, "start"), call.argument(3, "end"))
    start, stop, _ = bounds.indices(shape[dim])
    step = int(call.argument(4, "step", 1))
    length = call.outputs[0][dim]
    if step == 1 and 0 < length < shape[dim]:
        joined, windows, sizes = _windows(shape, dim, [(start, start + length)])
        return Windows(
            (joined,), windows, sizes, whole=_window_names([(0, 0)]), linear=FIRST, localize=_cut_slice,
            windows=((start, start + length),), uneven=_others(joined, dim),
        )  # fmt: skip
    if step > 1 and shape[dim] == length * step and start < step and shape[dim] > step:
        dims, sizes = dims_of(shape)
        name = f"d{dim}"
        source = (*dims[:dim], (name, "step"), *dims[dim + 1 :])
        sizes |= {name: length, "step": step}
        whole = frozenset({"step"})
        uneven = _others(source, dim)
        return Factoring((source,), (dims,), sizes, whole=whole, linear=FIRST, localize=_cut_steps, uneven=uneven)
    unchanged = shape == call.outputs[0] and step == 1
    return keeps_other_dims(call, () if unchanged else {dim}, FIRST)


def _cut_slice(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways) -> Local:
    dim = int(call.argument(1, "dim", 0)) % len(call.inputs[0])
    start = slice(call.argument(2, "start"), None).indices(call.inputs[0][dim])[0]
    assert strategy.part is not None
    if strategy.part.factor == "joined":
        start //= ways  # whole segments are before it, and each divides
    return (call.args[0], dim, start, start + outputs[0][dim]), {}


def _cut_steps(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways) -> Local:
    dim = int(call.argument(1, "dim", 0)) % len(call.inputs[0])
    step = int(call.argument(4, "step", 1))
    return (call.args[0], dim, call.argument(2, "start"), outputs[0][dim] * step, step), {}


def split_dim(call: Call) -> Factoring:
    """``qkv.split([q, k, v], dim)``: equal parts are an outer factor; unequal ones are windows."""
    shape = call.inputs[0]
    dim = int(call.argument(2, "dim", 0)) % len(shape)
    parts = [output[dim] for output in call.outputs]
    if len(set(parts)) == 1:
        dims, sizes = dims_of(shape)
        sizes |= {"part": len(parts), f"d{dim}": parts[0]}
        inner = (f"d{dim}",) if parts[0] != 1 else ()
        source = (*dims[:dim], ("part", *inner), *dims[dim + 1 :])
        target = (*dims[:dim], inner, *dims[dim + 1 :])
        outputs = (target,) * len(parts)
        whole = frozenset({"part"})
        return Factoring((source,), outputs, sizes, whole=whole, linear=FIRST, localize=_cut_pieces)
    bounds = _bounds(parts)
    joined, windows, sizes = _windows(shape, dim, bounds)
    return Windows(
        (joined,), windows, sizes, whole=_window_names(bounds), linear=FIRST, localize=_cut_pieces,
        windows=tuple(bounds), uneven=_others(joined, dim),
    )  # fmt: skip


def _bounds(sizes: list[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _cut_pieces(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways) -> Local:
    dim = int(call.argument(2, "dim", 0)) % len(call.inputs[0])
    parts = [shape[dim] for shape in outputs]
    sizes = parts if isinstance(call.argument(1, "split_size"), (list, tuple)) else parts[0]
    return (call.args[0], sizes, dim), {}


def concatenate(call: Call) -> Factoring:
    """Tensors joined along a dim: equal ones are an outer factor; unequal ones are windows."""
    dim = int(call.argument(1, "dim", 0)) % len(call.outputs[0])
    parts = [shape[dim] if len(shape) == len(call.outputs[0]) else 0 for shape in call.inputs]
    everything = (frozenset(range(len(call.inputs))),)
    if 0 in parts:  # torch allows an empty vector beside tensors of any rank
        lengths = {f"in{i}_{j}": ANY_SIZE for i, shape in enumerate(call.inputs) for j in range(len(shape))}
        inputs = tuple(tuple((f"in{i}_{j}",) for j in range(len(shape))) for i, shape in enumerate(call.inputs))
        target, sizes = dims_of(call.outputs[0], "out")
        return Factoring(inputs, (target,), sizes | lengths, whole=frozenset(sizes | lengths))
    dims, sizes = dims_of(call.outputs[0])
    if len(set(parts)) == 1:
        sizes |= {"part": len(parts), f"d{dim}": parts[0]}
        inner = (f"d{dim}",) if parts[0] != 1 else ()
        source = (*dims[:dim], inner, *dims[dim + 1 :])
        target = (*dims[:dim], ("part", *inner), *dims[dim + 1 :])
        return Factoring((source,) * len(parts), (target,), sizes, whole=frozenset({"part"}), linear=everything)
    bounds = _bounds(parts)
    joined, windows, sizes = _windows(call.outputs[0], dim, bounds)
    return Windows(windows, (joined,), sizes, whole=_window_names(bounds), linear=everything, windows=tuple(bounds))


def pad(call: Call) -> Factoring:
    """Padding: dims that grow stay whole. A pending sum may pass through where no constant is added."""
    amounts, rank = call.argument(1, "pad"), len(call.inputs[0])
    touched = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    value = call.argument(3, "value", 0) if call.target is aten.pad.default else call.argument(2, "value", 0)
    return keeps_other_dims(call, touched, FIRST if not value else ())


def write_slice(call: Call) -> Factoring:
    """``slice_scatter(x, new, dim, ...)``: the dim stays whole."""
    dim = int(call.argument(2, "dim", 0)) % len(call.inputs[0])
    return keeps_other_dims(call, {dim}, (frozenset({0, 1}),))


def write_position(call: Call) -> Factoring:
    """``select_scatter(x, new, dim, index)``: ``new`` lacks the dim."""
    dim = int(call.argument(2, "dim")) % len(call.inputs[0])
    factoring = keeps_other_dims(replace(call, inputs=call.inputs[:1]), {dim}, (frozenset({0, 1}),))
    whole = factoring.inputs[0]
    return replace(factoring, inputs=(whole, whole[:dim] + whole[dim + 1 :]))


RULES: dict[Any, Any] = {
    aten.slice.Tensor: slice_dim,
    aten.split.Tensor: split_dim,
    aten.split_with_sizes.default: split_dim,
    aten.cat.default: concatenate,
    aten.stack.default: at_dim("dim", " -> new", linear=True),
    **dict.fromkeys((aten.select.int, aten.unbind.int), at_dim("dim", "gone -> ; whole gone", linear=True)),
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.slice_scatter.default: write_slice,
    aten.select_scatter.default: write_position,
    aten.glu.default: at_dim("dim", "(half d) -> d; whole half"),
}
