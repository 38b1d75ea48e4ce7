"""The field forms of losses, experts and routing, convolutions, pooling, bags and recurrent layers.

They are written in operators that have forms: so each runs on numbers too, and there it is the operator
(``tests/proof/test_field_forms.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.operators.recurrent import autograd_within
from autopar.proof.field_tensor import FORMS, form

aten = torch.ops.aten

FORMS["autopar::straight_through"] = lambda value, surrogate: value.clone()

# ---------------------------------------------------------------- experts


def _seats(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, int]:
    """The rows that some expert takes, their places in a table of (experts, most rows of one), and that number."""
    known = (ids < experts).nonzero().flatten()
    order = known[ids[known].argsort(stable=True)]
    counts = ids[order].bincount(minlength=experts)
    most, first = int(counts.max()) if len(order) else 0, counts.cumsum(0) - counts
    turn = torch.arange(len(order)) - first[ids[order]]
    return order, ids[order] * most + turn, most


def _seated(x: Tensor, count: int, order: Tensor, places: Tensor, experts: int, most: int) -> Tensor:
    """(experts, most, width): the rows ``order`` of ``count`` ones, for which those of ``x`` stand."""
    rows = x.index_select(0, order // (count // max(len(x), 1)))
    return x.new_zeros(experts * most, x.shape[1]).index_copy(0, places, rows).unflatten(0, (experts, most))  # type: ignore[no-untyped-call, no-any-return]


@form("autopar::expert_linear")
def expert_linear(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    order, places, most = _seats(ids, len(weight))
    out = rows.new_zeros(len(ids), weight.shape[2])
    if not len(order):
        return out
    found = torch.bmm(_seated(rows, len(ids), order, places, len(weight), most), weight).flatten(0, 1)
    return out.index_copy(0, order, found.index_select(0, places))


@form("autopar::expert_outer")
def expert_outer(left: Tensor, right: Tensor, ids: Tensor, experts: int) -> Tensor:
    order, places, most = _seats(ids, experts)
    if not len(order):
        return left.new_zeros(experts, left.shape[1], right.shape[1])
    one, other = (_seated(x, len(ids), order, places, experts, most) for x in (left, right))
    return torch.bmm(one.transpose(1, 2), other)


@form("_grouped_mm")
def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """torch's product of groups of rows, or of columns, that end at ``offsets``."""
    if offsets is None:
        return torch.bmm(a, b)
    if b.dim() == 3:
        ids = torch.searchsorted(offsets.long(), torch.arange(len(a)), right=True)
        return expert_linear(a, b, ids)
    ids = torch.searchsorted(offsets.long(), torch.arange(a.shape[1]), right=True)
    return expert_outer(a.t(), b, ids, len(offsets))


# ---------------------------------------------------------------- convolutions and pooling


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


def _padded(x: Tensor, padding: Sequence[int], value: float = 0.0) -> Tensor:
    amounts = [side for size in reversed(padding) for side in (size, size)]
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


@form("avg_pool2d")
def avg_pool2d(
    x: Tensor,
    size: Any,
    stride: Any = (),
    padding: Any = (0,),
    ceil_mode: bool = False,
    count_padding: bool = True,
    divisor: Any = None,
) -> Tensor:
    windows, _, divide = _pools(x, size, stride, padding, ceil_mode, count_padding, divisor)
    found: Tensor = windows.sum((-3, -1)) / divide
    return found


@form("avg_pool2d_backward")
def avg_pool2d_backward(
    grad: Tensor, x: Tensor, size: Any, stride: Any, padding: Any, ceil_mode: bool, count_padding: bool, divisor: Any
) -> Tensor:
    windows, places, divide = _pools(x, size, stride, padding, ceil_mode, count_padding, divisor)
    size, padding = _of_each(size, 2), _of_each(padding, 2)
    spread = (grad / divide).unsqueeze(-2).unsqueeze(-1).expand(windows.shape)
    batched = spread if spread.dim() == 6 else spread.unsqueeze(0)
    found = _put_back(batched, places, [s + 2 * p for s, p in zip(x.shape[-2:], padding)])
    found = found.narrow(2, padding[0], x.shape[-2]).narrow(3, padding[1], x.shape[-1])
    return found.reshape(x.shape)


def _pools(x: Tensor, size: Any, stride: Any, padding: Any, ceil_mode: bool, count_padding: bool, divisor: Any) -> Any:
    if ceil_mode or (any(padding) and not count_padding):
        raise NotImplementedError("an average of windows of unequal sizes")
    size, padding = _of_each(size, 2), _of_each(padding, 2)
    stride = _of_each(stride, 2) or size
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    windows, places = _windows(_padded(batched, padding), size, stride, (1, 1))
    return windows if x.dim() == 4 else windows.squeeze(0), places, divisor or math.prod(size)


@form("max_pool2d_with_indices_backward")
def max_pool_backward(
    grad: Tensor, x: Tensor, size: Any, stride: Any, padding: Any, dilation: Any, ceil: Any, indices: Tensor
) -> Tensor:
    flat = grad.new_zeros(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    return flat.scatter_add(-1, indices.flatten(-2), grad.flatten(-2)).reshape(x.shape)


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


# ---------------------------------------------------------------- pooled look-ups


def _members(
    table: Tensor, ids: Tensor, offsets: Any, bags: Any, weights: Any, rank: Any, mode: str, padding_idx: int
) -> Any:
    """(rows, shares): the row of this rank's table for each id, and how much of it is in each bag, (B, n)."""
    flat = ids.reshape(-1)
    if offsets is None:
        owner = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        member = owner == torch.arange(len(ids))[:, None]
    else:
        ends = torch.cat([offsets, torch.tensor([len(flat)])])
        places = torch.arange(len(flat))
        member = (places >= ends[bags][:, None]) & (places < ends[bags + 1][:, None])
    member = member & (flat != padding_idx)
    share: Tensor = member.to(torch.float64)
    if mode == "mean":
        share = share / member.sum(1, keepdim=True).clamp(min=1)
    rows = flat if rank is None else flat - rank * len(table)
    here = (rows >= 0) & (rows < len(table))
    share = torch.where(here, share, 0.0).to(table.dtype)
    if weights is not None:
        share = share * weights.reshape(-1)
    return rows.clamp(0, len(table) - 1), share, member & here


@form("autopar::embedding_bags")
def embedding_bags(
    table: Tensor,
    ids: Tensor,
    offsets: Any,
    bags: Any,
    weights: Any,
    rank: Any,
    mode: str,
    padding_idx: int,
    total: int = 0,
) -> Tensor:
    if mode == "max":
        raise NotImplementedError("the largest of a bag")
    rows, share, _ = _members(table, ids, offsets, bags, weights, rank, mode, padding_idx)
    return torch.matmul(share, table.index_select(0, rows))


@form("autopar::embedding_bags_backward")
def embedding_bags_backward(
    grad: Tensor,
    table: Tensor,
    ids: Tensor,
    offsets: Any,
    bags: Any,
    weights: Any,
    rank: Any,
    mode: str,
    padding_idx: int,
    total: int = 0,
) -> tuple[Tensor, Tensor]:
    if mode == "max":
        raise NotImplementedError("the largest of a bag")
    rows, share, member = _members(table, ids, offsets, bags, weights, rank, mode, padding_idx)
    spread = torch.matmul(share.t(), grad)
    of_table = table.new_zeros(table.shape).index_add(0, rows, spread)
    if weights is None:
        return of_table, table.new_empty(0)
    products = torch.matmul(grad, table.index_select(0, rows).t())  # (B, n)
    return of_table, torch.where(member, products, 0.0).sum(0).reshape(weights.shape)


# ---------------------------------------------------------------- recurrent layers


@form("autopar::recurrent_layer")
def recurrent_layer(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> tuple[Tensor, Tensor]:
    outs, *_, last = _steps(x, states, weights, cell)
    return outs, last


@form("autopar::recurrent_layer_backward")
def recurrent_layer_backward(
    grad_y: Tensor, grad_last: Tensor, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str
) -> list[Tensor]:
    with autograd_within():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *states, *weights)]
        count = 1 + len(states)
        outs, _, last = _steps(leaves[0], leaves[1:count], leaves[count:], cell)
        return list(torch.autograd.grad((outs, last), leaves, (grad_y, grad_last)))


def _steps(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> tuple[Tensor, Tensor, Tensor]:
    w_ih, w_hh, *rest = weights
    biases = rest[:2] if len(rest) >= 2 else (None, None)
    projection = rest[-1] if len(rest) % 2 else None
    h, c = states[0], states[-1]
    outs = []
    for row in x:
        given, kept = (_linear(row, w_ih, biases[0]), _linear(h, w_hh, biases[1]))
        if cell == "lstm":
            i, f, g, o = (given + kept).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            h = h if projection is None else torch.matmul(h, projection.t())
        elif cell == "gru":
            (a, b, n), (a_h, b_h, n_h) = given.chunk(3, -1), kept.chunk(3, -1)
            z = (b + b_h).sigmoid()
            fresh = (n + (a + a_h).sigmoid() * n_h).tanh()
            h = fresh + z * (h - fresh)
        else:
            h = (given + kept).tanh() if cell == "rnn_tanh" else (given + kept).relu()
        outs.append(h)
    return torch.stack(outs), h, c if cell == "lstm" else h


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = torch.matmul(x, weight.t())
    return found if bias is None else found + bias
