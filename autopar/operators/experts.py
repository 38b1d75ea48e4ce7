"""Layers of experts: each row is multiplied with the matrix of the expert to which it was sent.

    expert_linear(rows, weight, ids) -> out           out[j] = rows[j // k] @ weight[ids[j]]
    expert_outer(left, right, ids, experts) -> sums   sums[e] = sum over ids[j] == e of left[j // k]^T right[j // m]

    rows (T, I)   weight (E, I, O)   ids (T * k) whole numbers   out (T * k, O)
    left (T * k or fewer, I)   right (T * k or fewer, O)   sums (E, I, O)

Rows stay in the order of the tokens: a batch can be cut anywhere, and no rank needs to know where another rank's tokens
go. k, the number of experts that a token is sent to, follows from the shapes. An id of E or more belongs to no expert:
its result is zero, and so is its gradient. An expert that no row was sent to gets a gradient of zeros.

The kernels sort the ids inside and multiply the rows of each expert at once (Gale et al. 2023, MegaBlocks, section 5):
on CUDA by torch's grouped product where it accepts the dtype and the widths, else expert by expert.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from autopar.operators.registry import library

aten = torch.ops.aten

_SCHEMAS = (
    "expert_linear(Tensor rows, Tensor weight, Tensor ids) -> Tensor",
    "expert_outer(Tensor left, Tensor right, Tensor ids, int experts) -> Tensor",
)
_LIBRARY = library(*_SCHEMAS)
EXPERT_LINEAR = torch.ops.autopar.expert_linear.default
EXPERT_OUTER = torch.ops.autopar.expert_outer.default

# ---------------------------------------------------------------- shapes and derivative


def _check(ids: Tensor, matrices: dict[str, Tensor], fits: bool) -> None:
    repeated = all(x.dim() == 2 and (x.shape[0] == 0 or ids.shape[0] % x.shape[0] == 0) for x in matrices.values())
    if ids.dim() != 1 or not repeated or not fits:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in matrices.items())
        raise ValueError(f"experts: {shapes} and ids {list(ids.shape)} do not fit together")
    if ids.dtype.is_floating_point or ids.dtype is torch.bool:
        raise ValueError(f"experts: ids are whole numbers, not {ids.dtype}")


@torch.library.register_fake("autopar::expert_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    fits = weight.dim() == 3 and weight.shape[1] == rows.shape[-1]
    if not fits or weight.dtype != rows.dtype:
        raise ValueError(
            f"experts: rows {rows.dtype} {list(rows.shape)} do not fit the weight {weight.dtype} {list(weight.shape)}"
        )
    _check(ids, {"rows": rows}, fits)
    return rows.new_empty(ids.shape[0], weight.shape[2])


@torch.library.register_fake("autopar::expert_outer", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _outer_shape(left: Tensor, right: Tensor, ids: Tensor, experts: int) -> Tensor:
    _check(ids, {"left": left, "right": right}, left.dtype == right.dtype)
    return left.new_empty(experts, left.shape[1], right.shape[1])


def added_copies(grads: Tensor, rows: int) -> Tensor:
    """The gradient of ``rows`` rows of which each was copied k times in a row: (rows * k, ...) -> (rows, ...)."""
    return grads if len(grads) == rows else grads.reshape(rows, len(grads) // rows, *grads.shape[1:]).sum(1)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, ids = ctx.saved_tensors
    to_rows = to_weight = None
    if ctx.needs_input_grad[0]:
        to_rows = added_copies(EXPERT_LINEAR(grad, weight.transpose(1, 2), ids), len(rows))
    if ctx.needs_input_grad[1]:
        if weight.is_contiguous():
            to_weight = EXPERT_OUTER(rows, grad, ids, len(weight))
        else:  # a transposed view has a transposed gradient, and the gradient of the tensor it views needs no copy
            to_weight = EXPERT_OUTER(grad, rows, ids, len(weight)).transpose(1, 2)
    return to_rows, to_weight, None


torch.library.register_autograd("autopar::expert_linear", _derivative, setup_context=_remember, lib=_LIBRARY)

# ---------------------------------------------------------------- kernels


def _by_expert(ids: Tensor, experts: int) -> list[Tensor]:
    """For each expert the positions of its ids, in order; the last entry has those that belong to no expert."""
    ordered, order = ids.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(1, experts + 1, dtype=ids.dtype, device=ids.device)).tolist()
    return [order[start:stop] for start, stop in pairwise([0, *ends, len(ids)])]


def _pick(x: Tensor, places: Tensor, count: int) -> Tensor:
    """The rows at ``places`` of a tensor of ``count`` rows; each row of ``x`` stands for equally many of them."""
    return x.index_select(0, places if len(x) == count else places // (count // len(x)))


def _linear(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    out = rows.new_empty(ids.shape[0], weight.shape[2])
    *chosen, rest = _by_expert(ids, len(weight))
    for matrix, places in zip(weight, chosen):
        if len(places):
            out.index_copy_(0, places, _pick(rows, places, len(ids)) @ matrix)
    return out.index_fill_(0, rest, 0) if len(rest) else out


def _outer(left: Tensor, right: Tensor, ids: Tensor, experts: int) -> Tensor:
    sums = left.new_empty(experts, left.shape[1], right.shape[1])
    for total, places in zip(sums, _by_expert(ids, experts)):
        torch.mm(_pick(left, places, len(ids)).t(), _pick(right, places, len(ids)), out=total)  # no row gives zeros
    return sums


def _takes_grouped(*matrices: Tensor) -> bool:
    """Whether torch's grouped product accepts these: bfloat16, rows that begin at multiples of 16 bytes."""
    return all(x.dtype is torch.bfloat16 and x.numel() > 0 and x.shape[-1] % 8 == 0 for x in matrices)


def _offsets(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ids in order, their first positions, and the ends of each expert's rows (int32), without a wait."""
    ordered, order = ids.sort(stable=True)
    ends = torch.arange(1, experts + 1, dtype=ids.dtype, device=ids.device)
    return ordered, order, torch.searchsorted(ordered, ends, out_int32=True)


def _grouped_linear(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    if not _takes_grouped(rows, weight, weight.transpose(1, 2)):
        return _linear(rows, weight, ids)
    ordered, order, ends = _offsets(ids, len(weight))
    found = aten._grouped_mm(_pick(rows, order, len(ids)), weight, ends)
    found.masked_fill_((ordered >= len(weight)).unsqueeze(1), 0)  # rows after the last end are arbitrary
    return torch.empty_like(found).index_copy_(0, order, found)


def _grouped_outer(left: Tensor, right: Tensor, ids: Tensor, experts: int) -> Tensor:
    if not _takes_grouped(left, right):
        return _outer(left, right, ids, experts)
    _, order, ends = _offsets(ids, experts)
    return aten._grouped_mm(_pick(left, order, len(ids)).t(), _pick(right, order, len(ids)), ends)  # type: ignore[no-any-return]


KERNELS = {
    "CUDA": (_grouped_linear, _grouped_outer),
    "CompositeExplicitAutograd": (_linear, _outer),  # any other device
}
for _device, (_forward, _backward) in KERNELS.items():
    _LIBRARY.impl("expert_linear", _forward, _device)  # type: ignore[no-untyped-call]
    _LIBRARY.impl("expert_outer", _backward, _device)  # type: ignore[no-untyped-call]
