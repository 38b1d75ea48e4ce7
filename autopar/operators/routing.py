"""Rows to the ranks of their experts, what is local about it: order, counts, and the ids of the rows that arrive.

    route_rows(ids, experts, ways, places) -> order, inverse, counts
    row_sizes(counts, received) -> send, receive
    received_ids(received, rows) -> ids
    permute_rows(x, order, inverse) -> out                  out[j] = x[order[j] // k]
    columns(x, dim, start, end, step) -> out                x[..., start:end:step, ...]

    ids (T * k) whole numbers        counts (1, ways, own + 1)      send, receive (ways)
    order, inverse (T * k)           received (ways, 1, own + 1)    x (T, ...)   out (T * k, ...)

``ways`` ranks have ``own = ceil(experts / ways)`` experts each. ``counts``: how many rows go to each rank and to each
of its experts; an exchange of its second dim for its first gives ``received``, how many rows came from each rank for
each own expert. The last of ``own + 1`` counts the rows of no expert (an id of ``experts`` or more), which the last
rank gets. Rows are sent in the order of the ranks, then of the experts, then of the tokens.

How many rows arrive is known at run time only. The shape functions say as many as were sent: so it is if the load is
balanced, and programs are compiled for that. ``row_sizes`` gives its results on the CPU, whose numbers the uneven
exchange needs there: one wait for a CUDA device in each layer, in forward.

(Rajbhandari et al. 2022, DeepSpeed-MoE, section 5; Gale et al. 2023, MegaBlocks.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.operators.experts import added_copies
from autopar.operators.registry import library

_LIBRARY = library(
    "route_rows(Tensor ids, int experts, int ways, int[]? places=None) -> (Tensor, Tensor, Tensor)",
    "row_sizes(Tensor counts, Tensor received) -> (Tensor, Tensor)",
    "received_ids(Tensor received, int rows) -> Tensor",
    "permute_rows(Tensor x, Tensor order, Tensor inverse) -> Tensor",
    "columns(Tensor x, int dim, int start, int end, int step) -> Tensor",
    "columns_backward(Tensor grad, int dim, int size, int start, int step) -> Tensor",
)
ROUTE_ROWS = torch.ops.autopar.route_rows.default
ROW_SIZES = torch.ops.autopar.row_sizes.default
RECEIVED_IDS = torch.ops.autopar.received_ids.default
PERMUTE_ROWS = torch.ops.autopar.permute_rows.default
COLUMNS = torch.ops.autopar.columns.default
COLUMNS_BACKWARD = torch.ops.autopar.columns_backward.default


def own_experts(experts: int, ways: int) -> int:
    """How many experts each of ``ways`` ranks has room for."""
    return -(-experts // ways)


# ---------------------------------------------------------------- routes


def slots_of(ids: Tensor, experts: int, ways: int, places: Sequence[int] | None = None) -> Tensor:
    """The slot of each id among ``ways * own`` ones, ``own`` of each rank; behind them that of ids of no expert."""
    slots = torch.arange(experts, device=ids.device) if places is None else torch.tensor(places, device=ids.device)
    return torch.nn.functional.pad(slots, (0, 1), value=ways * own_experts(experts, ways))[ids.clamp(0, experts)]


def check_experts(ids: Tensor, experts: int, places: Sequence[int] | None) -> None:
    """Raise ValueError unless ``ids`` are a list of whole numbers, and ``places`` has one for each expert."""
    if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype is torch.bool:
        raise ValueError(f"experts: ids are a list of whole numbers, not {ids.dtype} {list(ids.shape)}")
    if places is not None and (len(places) != experts or len(set(places)) != experts):
        raise ValueError(f"experts: {len(places)} places, {len(set(places))} of them different, for {experts} experts")


def _route(ids: Tensor, experts: int, ways: int, places: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    own = own_experts(experts, ways)
    slots = slots_of(ids, experts, ways, places)
    bins = slots + (slots // own).clamp(max=ways - 1)  # each rank has one more, which only the last one needs
    order = bins.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return order, inverse, bins.bincount(minlength=ways * (own + 1)).view(1, ways, own + 1)


@torch.library.register_fake("autopar::route_rows", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _route_shape(
    ids: Tensor, experts: int, ways: int, places: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_experts(ids, experts, places)
    numbers = ids.new_empty(ids.shape, dtype=torch.int64)
    counts = ids.new_empty((1, ways, own_experts(experts, ways) + 1), dtype=torch.int64)
    return numbers, torch.empty_like(numbers), counts


def _sizes(counts: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
    return counts.sum((0, 2)).cpu(), received.sum((1, 2)).cpu()


@torch.library.register_fake("autopar::row_sizes", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _sizes_shape(counts: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
    ways = received.shape[0]
    return counts.new_empty((ways,), device="cpu"), received.new_empty((ways,), device="cpu")


def _received(received: Tensor, rows: int) -> Tensor:
    ways, _, bins = received.shape
    return torch.arange(bins, device=received.device).repeat(ways).repeat_interleave(received.flatten())


@torch.library.register_fake("autopar::received_ids", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _received_shape(received: Tensor, rows: int) -> Tensor:
    return received.new_empty((rows,))


# ---------------------------------------------------------------- rows


def _permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.index_select(0, order if len(x) == len(order) else order // (len(order) // len(x)))


@torch.library.register_fake("autopar::permute_rows", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _permute_shape(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if len(x) and len(order) % len(x):
        raise ValueError(f"experts: {len(order)} ids are no multiple of {len(x)} rows")
    return x.new_empty((len(order), *x.shape[1:]))


def remember_rows(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    """For a derivative of rows that lie otherwise: how many there were, and the two lists of places."""
    x, *places = inputs
    ctx.rows = len(x)
    ctx.save_for_backward(*places)


def _permute_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, inverse = ctx.saved_tensors
    return added_copies(PERMUTE_ROWS(grad, inverse, order), ctx.rows), None, None


torch.library.register_autograd("autopar::permute_rows", _permute_derivative, setup_context=remember_rows, lib=_LIBRARY)


# ---------------------------------------------------------------- columns
# as torch's slice, whose derivative has all sizes of its operand among its arguments, that of ragged rows too


def _columns(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    return torch.ops.aten.slice.Tensor(x, dim, start, end, step).clone(memory_format=torch.contiguous_format)  # type: ignore[no-any-return]


def _columns_backward(grad: Tensor, dim: int, size: int, start: int, step: int) -> Tensor:
    whole = grad.new_zeros([size if d == dim else length for d, length in enumerate(grad.shape)])
    torch.ops.aten.slice.Tensor(whole, dim, start, start + step * grad.shape[dim], step).copy_(grad)
    return whole


@torch.library.register_fake("autopar::columns", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _columns_shape(x: Tensor, dim: int, start: int, end: int, step: int) -> Tensor:
    count = len(range(*slice(start, end, step).indices(x.shape[dim])))
    return x.new_empty([count if d == dim else length for d, length in enumerate(x.shape)])


@torch.library.register_fake("autopar::columns_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _columns_backward_shape(grad: Tensor, dim: int, size: int, start: int, step: int) -> Tensor:
    return grad.new_empty([size if d == dim else length for d, length in enumerate(grad.shape)])


def _remember_columns(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim, start, end, ctx.step = inputs
    ctx.size = x.shape[ctx.dim]
    ctx.start = slice(start, end, ctx.step).indices(ctx.size)[0]


def _columns_derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return COLUMNS_BACKWARD(grad, ctx.dim, ctx.size, ctx.start, ctx.step), None, None, None, None


torch.library.register_autograd("autopar::columns", _columns_derivative, setup_context=_remember_columns, lib=_LIBRARY)

for _name, _kernel in {
    "route_rows": _route,
    "row_sizes": _sizes,
    "received_ids": _received,
    "permute_rows": _permute,
    "columns": _columns,
    "columns_backward": _columns_backward,
}.items():
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
