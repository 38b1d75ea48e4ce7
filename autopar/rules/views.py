"""Operators that rearrange elements (reshape, transpose, expand, repeat), and those that work along some dims."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar.ir.layout import Split
from autopar.rules.at_dim import at_dim, at_end
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Factoring, Part, Shape, Strategy, Ways, dims_of
from autopar.rules.pointwise import broadcast_dims

aten = torch.ops.aten
FIRST = (frozenset({0}),)  # a view is linear


def cut_sizes(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways) -> tuple[Any, dict[str, Any]]:
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
        return _opaque_reshape(source, target)
    sizes: dict[str, int] = {}
    return Factoring(
        (_numbered(found[0], sizes),),
        (_numbered(found[1], sizes),),
        sizes,
        linear=FIRST,
        uneven=frozenset(sizes),
        localize=cut_sizes,
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


def _opaque_reshape(source: Shape, target: Shape) -> Factoring:
    """Equal leading dims may be split, and a common divisor of the next ones: (6, 4) and (4, 6) are both (2 ...)."""
    same = 0
    while same < min(len(source), len(target)) and source[same] == target[same]:
        same += 1
    lead, sizes = dims_of(source[:same])
    common = math.gcd(source[same], target[same]) if same < min(len(source), len(target)) else 1
    sides: list[Dims] = []
    whole: set[str] = set()
    for tag, shape in (("in", source), ("out", target)):
        names = [f"{tag}{i}" for i in range(same, len(shape))]
        whole.update(names)
        rest = [(name,) for name in names]
        sides.append((*lead, ("common", *rest[0]), *rest[1:]) if common > 1 else (*lead, *rest))
    sizes |= dict.fromkeys(whole, ANY_SIZE) | {"common": common}
    kept = frozenset(whole)
    return Factoring((sides[0],), (sides[1],), sizes, whole=kept, linear=FIRST, localize=cut_sizes)


def _permuted(call: Call, order: Sequence[int]) -> Factoring:
    dims, sizes = dims_of(call.inputs[0])
    return Factoring((dims,), (tuple(dims[i] for i in order),), sizes, linear=FIRST, uneven=frozenset(sizes))


def transpose(call: Call) -> Factoring:
    order = list(range(len(call.inputs[0])))
    a, b = int(call.argument(1, "dim0")), int(call.argument(2, "dim1"))
    if order:
        order[a], order[b] = order[b], order[a]
    return _permuted(call, order)


def permute(call: Call) -> Factoring:
    return _permuted(call, [d % len(call.inputs[0]) for d in call.argument(1, "dims")])


def swap_two(call: Call) -> Factoring:
    """``aten.t``: swaps the two dims of a matrix."""
    return _permuted(call, list(range(len(call.inputs[0])))[::-1])


def _ones(call: Call) -> tuple[tuple[Dims, Dims], dict[str, int]]:
    """Dims of size 1 appear or vanish; the others keep their order."""
    source, target = call.inputs[0], call.outputs[0]
    kept = [size for size in source if size != 1]
    assert kept == [size for size in target if size != 1], (source, target)
    names = [f"d{i}" for i in range(len(kept))]
    sides: list[Dims] = []
    for shape in (source, target):
        left = iter(names)
        sides.append(tuple((next(left),) if size != 1 else () for size in shape))
    return (sides[0], sides[1]), dict(zip(names, kept))


def unsqueeze(call: Call) -> Factoring:
    (source, target), sizes = _ones(call)
    return Factoring((source,), (target,), sizes, linear=FIRST, uneven=frozenset(sizes))


@dataclass(frozen=True)
class _Squeezed(Factoring):
    """A split must not leave a dim of size 1 among the ``squeezed`` ones, which would vanish with the others."""

    squeezed: frozenset[str] = frozenset()

    def allows(self, part: Part, ways: int) -> bool:
        vanishes = part.factor in self.squeezed and self.sizes[part.factor] <= ways
        return not vanishes and super().allows(part, ways)


def squeeze(call: Call) -> Factoring:
    """All dims are squeezed, or those that are named."""
    (source, target), sizes = _ones(call)
    named: Any = range(len(source)) if call.target is aten.squeeze.default else call.argument(1, "dim")
    dims = named if isinstance(named, Sequence) else [named]
    squeezed = frozenset(factor for dim in dims if source for factor in source[dim])
    return _Squeezed((source,), (target,), sizes, linear=FIRST, squeezed=squeezed)


def expand(call: Call) -> Factoring:
    """New dims, and dims of size 1 that grow, are factors that only the output has."""
    target, sizes = dims_of(call.outputs[0])
    offset = len(target) - len(call.inputs[0])
    source = tuple(target[i + offset] if size != 1 else () for i, size in enumerate(call.inputs[0]))
    return Factoring((source,), (target,), sizes, linear=FIRST, localize=cut_sizes)


def broadcast_together(call: Call) -> Factoring:
    """``broadcast_tensors``: every operand in the shape of all."""
    sizes = {f"d{len(shape) - i}": size for shape in call.outputs for i, size in enumerate(shape)}
    linear = (frozenset(range(len(call.inputs))),)
    sides = (tuple(map(broadcast_dims, call.inputs)), tuple(map(broadcast_dims, call.outputs)))
    return Factoring(*sides, sizes, linear=linear)


def repeat(call: Call) -> Factoring:
    """``repeat, tile``: a dim of the result is (copies, dim of the operand)."""
    source, target = call.inputs[0], call.outputs[0]
    offset = len(target) - len(source)
    sizes: dict[str, int] = {}
    dims: list[tuple[str, ...]] = []
    for i, size in enumerate(target):
        inner = source[i - offset] if i >= offset else 1
        sizes |= {f"copy{i}": size // inner if inner else 1, f"d{i - offset}": inner}
        dims.append(tuple(f for f in (f"copy{i}", f"d{i - offset}") if sizes[f] != 1))
    operand = tuple((f"d{i}",) if size != 1 else () for i, size in enumerate(source))
    return Factoring((operand,), (tuple(dims),), sizes, linear=FIRST, localize=_cut_copies)


def _cut_copies(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways) -> tuple[Any, dict[str, Any]]:
    split, source = strategy.inputs[0], list(call.inputs[0])
    if isinstance(split, Split):
        source[split.dim] //= ways
    padded = [1] * (len(outputs[0]) - len(source)) + source
    return (call.args[0], [size // max(inner, 1) for size, inner in zip(outputs[0], padded)]), {}


def repeat_interleave(call: Call) -> Factoring:
    """``x.repeat_interleave(n, dim)``: the dim becomes (dim, copies); without a dim, (all dims, copies)."""
    dims, sizes = dims_of(call.inputs[0])
    dim = call.argument(2, "dim")
    sizes["copy"] = int(call.argument(1, "repeats"))
    copies = ("copy",) if sizes["copy"] != 1 else ()
    if dim is None:
        target: Dims = ((*[f for factors in dims for f in factors], *copies),)
    else:
        at = int(dim) % len(dims)
        target = (*dims[:at], (*dims[at], *copies), *dims[at + 1 :])
    return Factoring((dims,), (target,), sizes, linear=FIRST, localize=_cut_interleaved)


def _cut_interleaved(
    call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways
) -> tuple[Any, dict[str, Any]]:
    copies = int(call.argument(1, "repeats"))
    assert strategy.part is not None
    return (call.args[0], copies // ways if strategy.part.factor == "copy" else copies, call.argument(2, "dim")), {}


# ---------------------------------------------------------------- along some dims


def keeps_other_dims(call: Call, touched: Collection[int], linear: tuple[frozenset[int], ...] = ()) -> Factoring:
    """All tensors have the same rank; the ``touched`` dims stay whole, the others are shared."""
    _, sizes = dims_of(call.outputs[0])
    sizes |= {f"d{i}": ANY_SIZE for i in touched}
    whole = frozenset(f"d{i}" for i in touched)

    def dims(shape: Shape) -> Dims:
        return tuple((f"d{i}",) if size != 1 or i in touched else () for i, size in enumerate(shape))

    uneven = frozenset(sizes) - whole if linear else frozenset()  # moving elements leaves padding as it is
    sides = (tuple(map(dims, call.inputs)), tuple(map(dims, call.outputs)))
    return Factoring(*sides, sizes, whole=whole, linear=linear, uneven=uneven)


def along_dims(position: int, name: str, default: Any = None, linear: bool = False) -> Any:
    """Rule for an operator that works along the dims of one argument (softmax, flip, cumsum): those stay whole."""

    def rule(call: Call) -> Factoring:
        dims = call.argument(position, name, default)
        rank = len(call.inputs[0])
        listed = range(rank) if dims in (None, []) else dims if isinstance(dims, (list, tuple)) else [dims]
        touched = {int(d) % rank for d in listed} if rank else set()
        return keeps_other_dims(call, touched, FIRST if linear else ())

    return rule


def diagonal(call: Call) -> Factoring:
    """Two dims become one, the last."""
    dims, sizes = dims_of(call.inputs[0])
    gone = [int(call.argument(i, f"dim{i - 1}", i - 2)) % len(dims) for i in (2, 3)]
    kept = tuple(dim for i, dim in enumerate(dims) if i not in gone)
    source = tuple((f"d{i}",) if i in gone else dim for i, dim in enumerate(dims))
    sizes |= {"diagonal": ANY_SIZE} | {f"d{i}": ANY_SIZE for i in gone}
    whole = frozenset({"diagonal", *(f"d{i}" for i in gone)})
    return Factoring((source,), ((*kept, ("diagonal",)),), sizes, whole=whole, linear=FIRST)


def generated(call: Call) -> Factoring:
    """``new_zeros(x, sizes)``: the dims of the output belong to no input."""
    ignored = tuple(tuple((f"in{i}_{j}",) for j in range(len(shape))) for i, shape in enumerate(call.inputs))
    whole = frozenset(name for tensor in ignored for dim in tensor for name in dim)
    target, sizes = dims_of(call.outputs[0])
    return Factoring(ignored, (target,), sizes | dict.fromkeys(whole, ANY_SIZE), whole=whole, localize=cut_sizes)


def created(call: Call) -> Factoring:
    """``full(sizes, value)``: computed from no tensor."""
    target, sizes = dims_of(call.outputs[0])
    return Factoring((), (target,), sizes, localize=_cut_created)


def _cut_created(call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways) -> tuple[Any, dict[str, Any]]:
    return (list(outputs[0]), *call.args[1:]), dict(call.kwargs)


def counted(call: Call) -> Factoring:
    """``arange``: only whole."""
    dims, sizes = dims_of(call.outputs[0])
    return Factoring((), (dims,), sizes, whole=frozenset(sizes))


RULES: dict[Any, Any] = {
    **dict.fromkeys((aten.reshape.default, aten.view.default, aten._unsafe_view.default), reshape),
    aten.transpose.int: transpose,
    aten.permute.default: permute,
    aten.t.default: swap_two,
    aten.unsqueeze.default: unsqueeze,
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), squeeze),
    aten.expand.default: expand,
    aten.broadcast_tensors.default: broadcast_together,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.flip.default: along_dims(1, "dims", linear=True),
    aten.roll.default: along_dims(2, "dims", linear=True),
    aten.cumsum.default: along_dims(1, "dim", linear=True),
    aten.diff.default: along_dims(2, "dim", -1, linear=True),
    aten.tril.default: at_end("row column -> row column; whole row column", linear=True),
    aten.triu.default: at_end("row column -> row column; whole row column", linear=True),
    aten.diagonal.default: diagonal,
    aten.unfold.default: at_dim("dimension", "along -> windows ... inside; whole along windows inside", linear=True),
    aten.view_as_complex.default: at_end("parts -> ; whole parts", linear=True),
    aten.view_as_real.default: at_end(" -> parts", linear=True),
    **dict.fromkeys(
        (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default), generated
    ),
    **dict.fromkeys((aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format), created),
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), counted),
    aten.scalar_tensor.default: counted,
}
