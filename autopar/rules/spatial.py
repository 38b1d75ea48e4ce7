"""Operators on images: convolutions, pooling, resizing, normalisation of channels. Positions stay whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autopar import operators
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Factoring, Shape, Strategy, Ways, dims_of
from autopar.rules.views import FIRST

aten = torch.ops.aten


def _positions(tag: str, count: int) -> Dims:
    return tuple((f"{tag}{i}",) for i in range(count))


def _lengths(names: Dims, shape: Shape) -> dict[str, int]:
    """Sizes of the last dims of a tensor (1 where only their names matter), for the work of a convolution."""
    last = shape[len(shape) - len(names) :] if shape else (1,) * len(names)
    return {name: size for (name,), size in zip(names, last)}


def convolution(call: Call) -> Factoring:
    """(N, groups C, ...), weight (groups O, C, ...): batch, groups, input and output channels may be split."""
    return _convolved(call, int(call.argument(6, "groups", 1)), False, _cut_groups(6))


def transposed_convolution(call: Call) -> Factoring:
    """As ``convolution``, with weight (groups C, O, ...)."""
    return _convolved(call, int(call.argument(6, "groups", 1)), True, _cut_groups(6))


def padded_convolution(call: Call) -> Factoring:
    """As ``convolution``, with the groups as its last argument."""
    return _convolved(call, int(call.args[9]), False, _cut_groups(9))


def _convolved(call: Call, groups: int, turned: bool, localize: Any) -> Factoring:
    weight = call.inputs[1]
    count = len(weight) - 2
    channels = call.inputs[0][-count - 1]
    produced = call.outputs[0][-count - 1]
    sizes = {"g": groups, "c": channels // groups, "o": produced // groups}
    batch: Dims = ()
    if len(call.inputs[0]) == len(weight):
        sizes["b"] = call.inputs[0][0]
        batch = (("b",),) if sizes["b"] != 1 else ((),)

    def only(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if sizes[name] != 1)

    taps, before, after = _positions("tap", count), _positions("from", count), _positions("to", count)
    whole = frozenset(f for dims in (taps, before, after) for dim in dims for f in dim)
    kernel = (only("g", "c"), only("o")) if turned else (only("g", "o"), only("c"))
    inputs: tuple[Dims, ...] = ((*batch, only("g", "c"), *before), (*kernel, *taps), (only("g", "o"),))
    bias = len(call.inputs) > 2
    return Factoring(
        inputs[: len(call.inputs)],
        ((*batch, only("g", "o"), *after),),
        sizes | _lengths(taps, weight) | _lengths(after, call.outputs[0]) | _lengths(before, ()),
        whole=whole,
        linear=(frozenset({0, 2}), frozenset({1, 2})) if bias else (frozenset({0}), frozenset({1})),
        added=frozenset({2}) if bias else frozenset(),
        localize=localize if groups > 1 else None,
        contraction=True,
    )


def _cut_groups(position: int) -> Any:
    def localize(
        call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = list(call.args), dict(call.kwargs)
        groups = int(call.argument(position, "groups", 1))
        if strategy.part and strategy.part.factor == "g":
            groups //= ways
        if len(args) > position:
            args[position] = groups
        else:
            kwargs["groups"] = groups
        return tuple(args), kwargs

    return localize


def resized(linear: bool) -> Any:
    """Rule for pooling and interpolation: batch and channels may be split."""

    def rule(call: Call) -> Factoring:
        shape, result = call.inputs[0], call.outputs[0]
        name = str(call.target)
        count = 1 if "1d" in name else 3 if "3d" in name or "trilinear" in name else 2
        lead, sizes = dims_of(shape[: len(shape) - count])
        before, after = _positions("from", count), _positions("to", len(result) - len(lead))
        whole = frozenset(f for dims in (before, after) for dim in dims for f in dim)
        sizes |= dict.fromkeys(whole, ANY_SIZE)
        outputs = ((*lead, *after),) * len(call.outputs)
        return Factoring(((*lead, *before),), outputs, sizes, whole=whole, linear=FIRST if linear else ())

    return rule


def group_norm(call: Call) -> Factoring:
    """(N, groups C, ...): a group is never cut."""
    dims, sizes = dims_of(call.inputs[0])
    groups = int(call.argument(1, "num_groups"))
    sizes |= {"g": groups, "c": call.inputs[0][1] // groups}
    channels = tuple(f for f in ("g", "c") if sizes[f] != 1)
    source = (dims[0], channels, *dims[2:])
    whole = frozenset(sizes) - {"d0", "g"}
    inputs = (source, *[(channels,)] * (len(call.inputs) - 1))
    return Factoring(inputs, (source,), sizes, whole=whole, localize=_cut_norm_groups)


def _cut_norm_groups(
    call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    groups = int(call.argument(1, "num_groups"))
    if strategy.part and strategy.part.factor == "g":
        groups //= ways
    return (call.args[0], groups, *call.args[2:]), dict(call.kwargs)


def channel_norm(call: Call) -> Factoring:
    """batch_norm in training: statistics of each channel over all else, so only channels may be split."""
    dims, sizes = dims_of(call.inputs[0])
    channel = (dims[1],)
    outputs = [dims if len(shape) == len(dims) else channel for shape in call.outputs]
    whole = frozenset(sizes) - {"d1"}
    return Factoring((dims, *[channel] * (len(call.inputs) - 1)), tuple(outputs), sizes, whole=whole)


def fixed_norm(call: Call) -> Factoring:
    """batch_norm in evaluation: the statistics are given, so every dim is independent."""
    factoring = channel_norm(call)
    empty: Dims = ((),)
    outputs = tuple(dims if shape != (0,) else empty for dims, shape in zip(factoring.outputs, call.outputs))
    return replace(factoring, outputs=outputs, whole=frozenset())


def instance_norm(call: Call) -> Factoring:
    """Statistics of each channel of each image; the running ones are those of all images."""
    factoring = channel_norm(call)
    running = call.argument(3, "running_mean") is not None
    return factoring if running else replace(factoring, whole=factoring.whole - {"d0"})


def pixel_shuffle(call: Call) -> Factoring:
    """(..., C p q, H, W) -> (..., C, H p, W q)."""
    return _shuffled(call, call.outputs[0], int(call.argument(1, "upscale_factor")), False)


def pixel_unshuffle(call: Call) -> Factoring:
    return _shuffled(call, call.inputs[0], int(call.argument(1, "downscale_factor")), True)


def _shuffled(call: Call, large: Shape, times: int, back: bool) -> Factoring:
    *_, channels, height, width = large
    lead, sizes = dims_of(large[:-3])
    sizes |= {"c": channels, "h": height // times, "w": width // times, "p": times, "q": times}

    def only(*names: str) -> tuple[str, ...]:
        return tuple(name for name in names if sizes[name] != 1)

    sides = ((*lead, only("c", "p", "q"), only("h"), only("w")), (*lead, only("c"), only("h", "p"), only("w", "q")))
    whole = frozenset({"p", "q"})
    return Factoring((sides[back],), (sides[not back],), sizes, whole=whole, linear=FIRST)


def patches(call: Call) -> Factoring:
    """``im2col``: (N, C, H, W) -> (N, C taps, positions)."""
    image, columns = call.inputs[0], call.outputs[0]
    return _patched(image, columns, lambda a, b: ((a,), (b,)))


def from_patches(call: Call) -> Factoring:
    """``col2im``: (N, C taps, positions) -> (N, C, H, W), overlaps added."""
    return _patched(call.outputs[0], call.inputs[0], lambda a, b: ((b,), (a,)))


def _patched(image: Shape, columns: Shape, ordered: Any) -> Factoring:
    lead, sizes = dims_of(image[:-3])
    channels = image[-3]
    sizes |= {"c": channels, "taps": columns[-2] // channels, "positions": ANY_SIZE, "y": ANY_SIZE, "x": ANY_SIZE}
    only = tuple(f for f in ("c", "taps") if sizes[f] != 1)
    pixels: Dims = (*lead, ("c",) if channels != 1 else (), ("y",), ("x",))
    folded: Dims = (*lead, only, ("positions",))
    inputs, outputs = ordered(pixels, folded)
    return Factoring(inputs, outputs, sizes, whole=frozenset({"taps", "positions", "y", "x"}), linear=FIRST)


def sampled(call: Call) -> Factoring:
    """``grid_sampler(x, grid)``: each position of the grid reads anywhere in the image."""
    image, result = call.inputs[0], call.outputs[0]
    dims, sizes = dims_of(result)
    before = _positions("from", len(image) - 2)
    whole = frozenset({"coordinate", *(f for dim in before for f in dim)})
    grid = (dims[0], *dims[2:], ("coordinate",))
    sizes |= dict.fromkeys(whole, ANY_SIZE)
    return Factoring(((*dims[:2], *before), grid), (dims,), sizes, whole=whole, linear=FIRST)


def shuffled_channels(call: Call) -> Factoring:
    dims, sizes = dims_of(call.inputs[0])
    return Factoring((dims,), (dims,), sizes, whole=frozenset({"d1"}), linear=FIRST)


def grid_of_positions(call: Call) -> Factoring:
    """``affine_grid_generator(theta, [N, C, H, W])``: one grid (H, W, 2) for each matrix."""
    b = ("b",) if call.inputs[0][0] != 1 else ()
    after = _positions("to", len(call.outputs[0]) - 1)
    names = dict.fromkeys(("row", "column", *(f for dim in after for f in dim)), ANY_SIZE)
    sizes = {"b": call.inputs[0][0], **names}
    theta: Dims = (b, ("row",), ("column",))
    return Factoring((theta,), ((b, *after),), sizes, whole=frozenset(names), linear=FIRST, localize=_cut_batch)


def _cut_batch(
    call: Call, strategy: Strategy, outputs: tuple[Shape, ...], ways: Ways
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    theta, shape, *rest = call.args
    return (theta, [outputs[0][0], *shape[1:]], *rest), dict(call.kwargs)


def unpooled(call: Call) -> Factoring:
    """``max_unpool``: positions within an image, so that images and channels may be split."""
    count = 3 if "3d" in str(call.target) else 2
    lead, sizes = dims_of(call.inputs[0][:-count])
    before, after = _positions("from", count), _positions("to", count)
    whole = frozenset(f for dims in (before, after) for dim in dims for f in dim)
    sizes |= dict.fromkeys(whole, ANY_SIZE)
    return Factoring(((*lead, *before),) * 2, ((*lead, *after),), sizes, whole=whole, linear=FIRST)


def renormalised(call: Call) -> Factoring:
    """``renorm(x, p, dim, most)``: the norm of each slice of a dim is taken over all other dims."""
    dims, sizes = dims_of(call.inputs[0])
    return Factoring((dims,), (dims,), sizes, whole=frozenset(sizes) - {f"d{int(call.args[2]) % len(dims)}"})


_MEANS = (
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default, aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec, aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact3d.vec,
    aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
    aten.upsample_trilinear3d.vec, aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec,
    *([aten._upsample_lanczos2d_aa.vec] if hasattr(aten, "_upsample_lanczos2d_aa") else []),  # torch 2.11 lacks it
)  # fmt: skip
_MAXIMA = (
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.max_pool2d_with_indices.default,
    aten.adaptive_max_pool2d.default, aten.adaptive_max_pool1d.default, aten.adaptive_max_pool3d.default,
)  # fmt: skip

RULES: dict[Any, Any] = {
    operators.padded_convolution: padded_convolution,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), convolution),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input), transposed_convolution),
    aten.conv_transpose3d.input: transposed_convolution,
    **dict.fromkeys(_MEANS, resized(linear=True)),
    **dict.fromkeys(_MAXIMA, resized(linear=False)),
    aten.group_norm.default: group_norm,
    aten.instance_norm.default: instance_norm,
    aten._native_batch_norm_legit_functional.default: channel_norm,
    aten._native_batch_norm_legit.no_stats: channel_norm,
    aten._native_batch_norm_legit_no_training.default: fixed_norm,
    aten.pixel_shuffle.default: pixel_shuffle,
    aten.pixel_unshuffle.default: pixel_unshuffle,
    aten.channel_shuffle.default: shuffled_channels,
    aten.im2col.default: patches,
    aten.col2im.default: from_patches,
    **dict.fromkeys((aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default), sampled),
    aten.affine_grid_generator.default: grid_of_positions,
    **dict.fromkeys((aten.max_unpool2d.default, aten.max_unpool3d.default), unpooled),
    aten.renorm.default: renormalised,
}
