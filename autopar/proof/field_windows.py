"""The field forms of convolutions, pooling and interpolation: windows are taken out, and added where they overlap."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from autopar.operators.recurrent import autograd_within
from autopar.proof.field_tensor import FORMS, form

aten = torch.ops.aten


def _windows(
    x: Tensor, sizes: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """(N, C, in...) -> (N, C, out, taps, out, taps, ...), and the places that were taken along each dim."""
    places = []
    for number, (size, step, apart) in enumerate(zip(sizes, stride, dilation)):
        dim = 2 + 2 * number
        count = (x.shape[dim] - apart * (size - 1) - 1) // step + 1
        at = (torch.arange(count)[:, None] * step + torch.arange(size) * apart).flatten()
        x = x.index_select(dim, at).unflatten(dim, (count, size))  # type: ignore[no-untyped-call]
        places.append(at)
    return x, places


def _put_back(windows: Tensor, places: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The dual of :func:`_windows`: what was taken several times is added up."""
    for number, (at, size) in reversed(list(enumerate(zip(places, sizes)))):
        dim = 2 + 2 * number
        flat = windows.flatten(dim, dim + 1)
        shape = [size if d == dim else s for d, s in enumerate(flat.shape)]
        windows = flat.new_zeros(shape).index_add(dim, at, flat)
    return windows


def _padded(x: Tensor, padding: Sequence[int], value: float = 0.0, behind: Sequence[int] = ()) -> Tensor:
    amounts = [side for size in reversed(padding) for side in (size, size)]
    amounts = amounts or [side for size in reversed(behind) for side in (0, size)]
    return torch.constant_pad_nd(x, amounts, value) if any(amounts) else x


def _columns(windows: Tensor, groups: int) -> Tensor:
    """(N, C, out, taps, ...) -> (groups, N * outs, C / groups * taps)."""
    spatial = (windows.dim() - 2) // 2
    outs, taps = [2 + 2 * i for i in range(spatial)], [3 + 2 * i for i in range(spatial)]
    x = windows.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]
    x = x.permute(1, 0, *(d + 1 for d in outs), 2, *(d + 1 for d in taps))
    return x.flatten(2 + spatial).flatten(1, 1 + spatial)  # type: ignore[no-any-return]


def _convolved(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    windows, _ = _windows(_padded(x, padding), weight.shape[2:], stride, dilation)
    outs = [windows.shape[2 + 2 * i] for i in range(weight.dim() - 2)]
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    found = torch.bmm(_columns(windows, groups), matrix.transpose(1, 2))  # (groups, N * outs, O / groups)
    return found.unflatten(1, (len(x), -1)).permute(1, 0, 3, 2).reshape(len(x), weight.shape[0], *outs)  # type: ignore[no-untyped-call, no-any-return]


def _of_input(
    grad: Tensor, weight: Tensor, sizes: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The gradient (N, C, in...) of a convolution's input, and the forward of a transposed one."""
    spatial = weight.dim() - 2
    count, taps = len(grad), list(weight.shape[2:])
    outs = list(grad.shape[2:])
    rows = grad.reshape(count, groups, -1, math.prod(outs)).permute(1, 0, 3, 2).flatten(1, 2)
    columns = torch.bmm(rows, weight.reshape(groups, weight.shape[0] // groups, -1))  # (g, N * outs, C / g * taps)
    blocks = columns.reshape(groups, count, *outs, weight.shape[1], *taps)
    order = [1, 0, 2 + spatial]
    for number in range(spatial):
        order += [2 + number, 3 + spatial + number]
    windows = blocks.permute(order).flatten(1, 2)
    padded = [size + 2 * side for size, side in zip(sizes, padding)]
    places = [
        (torch.arange(out)[:, None] * step + torch.arange(size) * apart).flatten()
        for out, size, step, apart in zip(outs, taps, stride, dilation)
    ]
    found = _put_back(windows, places, padded)
    for number, (size, side) in enumerate(zip(sizes, padding)):
        found = found.narrow(2 + number, side, size)
    return found.contiguous()


def _of_weight(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    windows, _ = _windows(_padded(x, padding), weight.shape[2:], stride, dilation)
    for number in range(weight.dim() - 2):
        windows = windows.narrow(2 + 2 * number, 0, grad.shape[2 + number])
    rows = grad.reshape(len(grad), groups, -1, math.prod(grad.shape[2:])).permute(1, 2, 0, 3).flatten(2)
    return torch.bmm(rows, _columns(windows, groups)).reshape(weight.shape)


@form("convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    stride, padding, dilation = (_of_each(given, weight.dim() - 2) for given in (stride, padding, dilation))
    if transposed:
        more = _of_each(output_padding, weight.dim() - 2)
        sizes = [
            (size - 1) * step - 2 * side + apart * (taps - 1) + 1 + extra
            for size, step, side, apart, taps, extra in zip(
                x.shape[2:], stride, padding, dilation, weight.shape[2:], more
            )
        ]
        found = _of_input(x, weight, sizes, stride, padding, dilation, groups)
    else:
        found = _convolved(x, weight, stride, padding, dilation, groups)
    return found if bias is None else found + bias.reshape(-1, *[1] * (weight.dim() - 2))


def _of_each(given: Any, dims: int) -> list[int]:
    return list(given) * (dims if len(given) == 1 else 1)


@form("convolution_backward")
def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    stride, padding, dilation = (_of_each(given, weight.dim() - 2) for given in (stride, padding, dilation))
    rest = (stride, padding, dilation, groups)
    if transposed:
        of_x = _convolved(grad, weight, *rest) if wanted[0] else None
        of_weight = _of_weight(x, grad, weight, *rest) if wanted[1] else None
    else:
        of_x = _of_input(grad, weight, x.shape[2:], *rest) if wanted[0] else None
        of_weight = _of_weight(grad, x, weight, *rest) if wanted[1] else None
    of_bias = grad.sum([0, *range(2, grad.dim())]) if wanted[2] else None
    return of_x, of_weight, of_bias


def avg_pool(
    dims: int, x: Tensor, size: Any, stride: Any = (), padding: Any = (0,), ceil_mode: bool = False,
    count_padding: bool = True, divisor: Any = None,
) -> Tensor:  # fmt: skip
    batched, windows, _, divide = _pools(dims, x, size, stride, padding, ceil_mode, count_padding, divisor)
    found: Tensor = windows.sum(_taps(windows)) / divide
    return found if batched.dim() == x.dim() else found.squeeze(0)


def avg_pool_backward(
    dims: int,
    grad: Tensor,
    x: Tensor,
    size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_padding: bool,
    divisor: Any,
) -> Tensor:
    batched, windows, places, divide = _pools(dims, x, size, stride, padding, ceil_mode, count_padding, divisor)
    spread = (grad if batched.dim() == x.dim() else grad.unsqueeze(0)) / divide
    for dim in _taps(windows):
        spread = spread.unsqueeze(dim)
    sides = _of_each(padding, batched.dim() - 2)
    sizes = [max(length + 2 * side, int(at.max()) + 1) for length, side, at in zip(batched.shape[2:], sides, places)]
    found = _put_back(spread.expand(windows.shape), places, sizes)
    for number, side in enumerate(sides):
        found = found.narrow(2 + number, side, batched.shape[2 + number])
    return found.reshape(x.shape)


for _dims in (1, 2, 3):
    FORMS[f"avg_pool{_dims}d"] = functools.partial(avg_pool, _dims)
    FORMS[f"avg_pool{_dims}d_backward"] = functools.partial(avg_pool_backward, _dims)


def _taps(windows: Tensor) -> list[int]:
    return list(range(3, windows.dim(), 2))


def _pools(
    dims: int, x: Tensor, size: Any, stride: Any, padding: Any, ceil_mode: bool, count_padding: bool, divisor: Any
) -> tuple[Tensor, Tensor, list[Tensor], Any]:
    """The batched operand, its windows, the places that these take, and by what their sums are divided."""
    size, padding = _of_each(size, dims), _of_each(padding, dims)
    stride = _of_each(stride, dims) if stride else size
    batched = x if x.dim() == dims + 2 else x.unsqueeze(0)
    behind = [_behind(*each, ceil_mode) for each in zip(batched.shape[2:], size, stride, padding)]
    ones = torch.ones(1, 1, *batched.shape[2:], dtype=x.dtype)
    windows, places = _windows(_padded(_padded(batched, padding), (), behind=behind), size, stride, (1,) * dims)
    counted = _padded(_padded(ones, padding, 1.0 if count_padding else 0.0), (), behind=behind)
    counts, _ = _windows(counted, size, stride, (1,) * dims)
    return batched, windows, places, divisor or counts.sum(_taps(counts))


def _behind(length: int, size: int, step: int, side: int, ceil_mode: bool) -> int:
    """How many places the last window needs behind the padding."""
    if not ceil_mode:
        return 0
    count = -(-(length + 2 * side - size) // step) + 1
    count -= (count - 1) * step >= length + side  # none begins behind the operand
    return max((count - 1) * step + size - length - 2 * side, 0)


def max_pool_backward(dims: int, grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """``rest``: the places of the largest, numbered in each image, behind what says the windows."""
    flat = grad.new_zeros(*x.shape[:-dims], math.prod(x.shape[-dims:]))
    return flat.scatter_add(-1, rest[-1].flatten(-dims), grad.flatten(-dims)).reshape(x.shape)


for _dims in (2, 3):
    FORMS[f"max_pool{_dims}d_with_indices_backward"] = functools.partial(max_pool_backward, _dims)
    FORMS[f"adaptive_max_pool{_dims}d_backward"] = functools.partial(max_pool_backward, _dims)


def _bins(size: int, count: int) -> Tensor:
    """(count, size): the share of each element in each average of an adaptive pool."""
    at, places = torch.arange(count), torch.arange(size)
    start, stop = at * size // count, ((at + 1) * size + count - 1) // count
    inside = (places >= start[:, None]) & (places < stop[:, None])
    return inside.double() / (stop - start)[:, None]


@form("_adaptive_avg_pool2d")
def adaptive_avg_pool2d(x: Tensor, sizes: Sequence[int]) -> Tensor:
    down, across = (_bins(size, count).to(x.dtype) for size, count in zip(x.shape[-2:], sizes))
    return torch.matmul(torch.matmul(down, x), across.t())


@form("_adaptive_avg_pool2d_backward")
def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    down, across = (_bins(size, count).to(x.dtype) for size, count in zip(x.shape[-2:], grad.shape[-2:]))
    return torch.matmul(torch.matmul(down.t(), grad), across)


# ---------------------------------------------------------------- interpolation


def _adjoint(forward: Any) -> Any:
    """The backward of an operator that is linear in its first operand: (grad, output size, input size, ...)."""

    def backward(grad: Tensor, size: Sequence[int], sizes: Sequence[int], *rest: Any) -> Tensor:
        with autograd_within():
            x = grad.new_zeros(sizes).requires_grad_()
            (found,) = torch.autograd.grad(decomposition_table[forward](x, size, *rest), [x], [grad])
        return found

    return backward


for _name in (
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
):  # fmt: skip
    FORMS[f"{_name}_backward"] = _adjoint(getattr(aten, _name).default)
