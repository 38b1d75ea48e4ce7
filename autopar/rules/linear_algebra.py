"""Operators on matrices (split by their batch), on diagonals, and Fourier transforms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autopar.rules.factoring import ANY_SIZE, Call, Dims, Factoring, Shape, dims_of
from autopar.rules.pointwise import broadcast_dims
from autopar.rules.views import FIRST, along_dims, keeps_other_dims

aten = torch.ops.aten


def matrices(call: Call) -> Factoring:
    """An operator on (..., n, m) matrices: the leading dims, broadcast together, are its batch; the rest is whole."""
    ranks = [_own_rank(call, position) for position in range(len(call.inputs))]
    leads = [shape[: len(shape) - rank] for shape, rank in zip(call.inputs, ranks)]
    batch = tuple(torch.broadcast_shapes(*leads))  # type: ignore[no-untyped-call]
    sizes = {f"d{len(batch) - i}": size for i, size in enumerate(batch)}
    whole: dict[str, int] = {}

    def dims(tag: str, shape: Shape, lead: Shape) -> Dims:
        own = [f"{tag}_{i}" for i in range(len(shape) - len(lead))]
        whole.update(dict.fromkeys(own, ANY_SIZE))
        return (*broadcast_dims(lead), *((name,) for name in own))

    inputs = tuple(dims(f"in{k}", shape, lead) for k, (shape, lead) in enumerate(zip(call.inputs, leads)))
    outputs = []
    for k, shape in enumerate(call.outputs):  # factors of a shared matrix; none where they are not requested
        lead = next((lead for lead in (batch, leads[0]) if shape[: len(lead)] == lead), ())
        outputs.append(dims(f"out{k}", shape, lead))
    same = dict.fromkeys(sizes, "whole")
    return Factoring(inputs, tuple(outputs), sizes | whole, whole=frozenset(whole), reduce=same)


_VECTORS = {
    aten.linalg_householder_product.default: {1},
    aten.linalg_lu_solve.default: {1},
    aten.lu_unpack.default: {1},
}
_NUMBERS = {aten.linalg_pinv.atol_rtol_tensor: {1, 2}}  # tolerances, one for each matrix


def _own_rank(call: Call, position: int) -> int:
    """The number of dims of an operand that belong to one matrix (or vector, or number) of the batch."""
    first, shape = call.inputs[0], call.inputs[position]
    if position in _NUMBERS.get(call.target, ()):
        return 0
    solved = call.target is aten._linalg_solve_ex.default and position == 1 and shape == first[:-1]
    return 1 if solved or position in _VECTORS.get(call.target, ()) else 2


def new_diagonal(call: Call) -> Factoring:
    """``diag_embed``: the last dim becomes the diagonal of two."""
    rank = len(call.outputs[0])
    at = {int(call.argument(i, f"dim{i - 1}", i - 4)) % rank for i in (2, 3)}
    dims, sizes = dims_of(call.inputs[0][:-1])
    rest = iter(dims)
    target = tuple((f"new{i}",) if i in at else next(rest) for i in range(rank))
    whole = frozenset({"last", *(f"new{i}" for i in at)})
    sizes |= dict.fromkeys(whole, ANY_SIZE)
    return Factoring(((*dims, ("last",)),), (target,), sizes, whole=whole, linear=FIRST)


def write_diagonal(call: Call) -> Factoring:
    """``diagonal_scatter(x, new, offset, dim1, dim2)``: ``new`` lacks the two dims and has the diagonal last."""
    rank = len(call.inputs[0])
    at = {int(call.argument(i, f"dim{i - 2}", i - 3)) % rank for i in (3, 4)}
    factoring = keeps_other_dims(replace(call, inputs=call.inputs[:1]), at, (frozenset({0, 1}),))
    x = factoring.inputs[0]
    new = (*(factors for i, factors in enumerate(x) if i not in at), ("last",))
    whole = factoring.whole | {"last"}
    return replace(factoring, inputs=(x, new), sizes={**factoring.sizes, "last": ANY_SIZE}, whole=whole)


def spectrogram(call: Call) -> Factoring:
    """``stft``: (batch, samples) -> (batch, frequencies, frames); a window is used whole."""
    batched = len(call.inputs[0]) > 1
    sizes = {"b": call.inputs[0][0] if batched else 1, "samples": ANY_SIZE, "window": ANY_SIZE}
    lead: Dims = ((("b",) if sizes["b"] != 1 else ()),) if batched else ()
    own = [f"out{i}" for i in range(len(call.outputs[0]) - len(lead))]
    inputs = ((*lead, ("samples",)), (("window",),))[: len(call.inputs)]
    whole = frozenset({"samples", "window", *own})
    outputs = ((*lead, *((name,) for name in own)),)
    return Factoring(inputs, outputs, sizes | dict.fromkeys(own, ANY_SIZE), whole=whole, linear=FIRST)


_MATRICES = (
    aten.linalg_inv.default, aten.linalg_det.default, aten.linalg_cholesky.default, aten.inverse.default,
    aten.cholesky.default, aten.cholesky_inverse.default, aten.cholesky_solve.default, aten.linalg_cholesky_ex.default,
    aten.linalg_eig.default, aten._linalg_eigvals.default, aten._linalg_eigh.default, aten._linalg_svd.default,
    aten.linalg_householder_product.default, aten.linalg_inv_ex.default, aten.linalg_lu.default,
    aten.linalg_lu_factor_ex.default, aten.linalg_lu_solve.default, aten.lu_unpack.default,
    aten.linalg_matrix_exp.default, aten.linalg_qr.default, aten.linalg_solve_triangular.default,
    aten.triangular_solve.default, aten._linalg_det.default, aten._linalg_slogdet.default,
    aten._linalg_solve_ex.default, aten.linalg_pinv.atol_rtol_tensor,
)  # fmt: skip
_TRANSFORMS = (aten.fft_fft.default, aten.fft_ifft.default, aten.fft_rfft.default, aten.fft_irfft.default)
_PLANES = (aten.fft_fft2.default, aten.fft_ifft2.default, aten.fft_rfft2.default, aten.fft_irfft2.default)
_BELOW = (aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default)

RULES: dict[Any, Any] = {
    **dict.fromkeys(_MATRICES, matrices),
    aten.diag_embed.default: new_diagonal,
    aten.diagonal_scatter.default: write_diagonal,
    **dict.fromkeys(_TRANSFORMS, along_dims(2, "dim", -1, linear=True)),
    **dict.fromkeys(_PLANES, along_dims(2, "dim", [-2, -1], linear=True)),
    **dict.fromkeys(_BELOW, along_dims(1, "dim", linear=True)),
    aten.stft.default: spectrogram,
    aten.rot90.default: along_dims(2, "dims", [0, 1], linear=True),
}
