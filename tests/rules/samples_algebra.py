"""Sample calls of matrices by the batch, diagonals, Fourier transforms, and reductions that are made of parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.verification.rule_check import Sample
from tests.rules.tensors import above, call, cplx, distinct, flags, ints, unit, x

aten = torch.ops.aten

_EYE = torch.eye(3, dtype=torch.float64)


def _definite(*batch: int) -> Tensor:
    """Symmetric, with well separated eigenvalues."""
    root = x(*batch, 3, 3)
    return root @ root.transpose(-2, -1) + torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))


def _lower(*batch: int) -> Tensor:
    return _definite(*batch).tril()


_SQUARE = [call(_definite(6)), call(_definite(2, 6)), call(_definite(1, 3)), call(_definite())]
_LU, _PIVOTS, _ = torch.linalg.lu_factor_ex(_definite(6))
_WIDE_LU, _WIDE_PIVOTS, _ = torch.linalg.lu_factor_ex(x(6, 3, 3))

ALGEBRA: dict[Any, list[Sample]] = {
    **dict.fromkeys(
        (
            aten.linalg_inv.default, aten.inverse.default, aten.linalg_det.default, aten.linalg_cholesky.default,
            aten.cholesky.default, aten.linalg_cholesky_ex.default, aten.linalg_inv_ex.default,
            aten._linalg_det.default, aten._linalg_slogdet.default, aten.linalg_lu_factor_ex.default,
            aten.linalg_lu.default, aten.linalg_qr.default, aten.linalg_matrix_exp.default,
        ),
        _SQUARE,
    ),
    aten._linalg_eigvals.default: [call(_definite(6), still=(0,))],
    aten.linalg_eig.default: [call(_definite(6), still=(0,))],  # the gradient of an eigenvector has no fixed phase
    aten._linalg_eigh.default: [call(_definite(6)), call(_definite(2, 6), "U", False, still=(0,))],
    aten._linalg_svd.default: [call(x(6, 3, 4)), call(x(2, 6, 3, 2), False, False, still=(0,))],
    aten._linalg_solve_ex.default: [
        call(_definite(6), x(6, 3, 2)),
        call(_definite(6), x(6, 3)),
        call(_definite(2, 1), x(6, 3, 2)),
        call(_definite(4), x(4, 2, 3), left=False),
    ],
    aten.linalg_solve_triangular.default: [
        call(_lower(6), x(6, 3, 2), upper=False),
        call(_lower(1), x(6, 3, 2), upper=False),
    ],
    aten.triangular_solve.default: [call(x(6, 3, 2), _lower(6), False)],
    aten.cholesky_solve.default: [call(x(6, 3, 2), torch.linalg.cholesky(_definite(6)))],
    aten.cholesky_inverse.default: [call(torch.linalg.cholesky(_definite(6)))],
    aten.linalg_householder_product.default: [call(x(6, 4, 3), unit(6, 3)), call(x(2, 3, 4, 2), unit(2, 3, 2))],
    aten.linalg_lu_solve.default: [call(_LU, _PIVOTS, x(6, 3, 2))],
    aten.lu_unpack.default: [call(_WIDE_LU, _WIDE_PIVOTS), call(_WIDE_LU, _WIDE_PIVOTS, False, True, still=(0,))],
    aten.linalg_pinv.atol_rtol_tensor: [call(x(6, 3, 2), rtol=torch.tensor(1e-9), still=(1,)), call(x(6, 2, 3))],
    aten.diag_embed.default: [call(x(6, 4)), call(x(6, 3, 4), 1, 0, -1)],
    aten.diagonal_scatter.default: [
        call(x(6, 4, 4), x(6, 4), 0, 1, 2), call(x(4, 4), x(3), 1), call(x(4, 6, 4), x(6, 4), 0, 0, 2)
    ],
    aten.rot90.default: [call(x(6, 4, 3), 1, [1, 2]), call(x(4, 3, 6))],
}  # fmt: skip

FOURIER: dict[Any, list[Sample]] = {
    **dict.fromkeys((aten.fft_fft.default, aten.fft_ifft.default), [call(cplx(6, 4)), call(cplx(6, 4), None, 0)]),
    aten.fft_rfft.default: [call(x(6, 4)), call(x(4, 6), 8, 0)],
    aten.fft_irfft.default: [call(cplx(6, 4)), call(cplx(4, 6), 5, 0)],
    **dict.fromkeys(
        (aten.fft_fft2.default, aten.fft_ifft2.default), [call(cplx(6, 4, 3)), call(cplx(4, 3, 6), None, [0, 1])]
    ),
    aten.fft_rfft2.default: [call(x(6, 4, 3))],
    aten.fft_irfft2.default: [call(cplx(6, 4, 3))],
    aten._fft_c2c.default: [call(cplx(6, 4, 3), [1, 2], 0, True), call(cplx(4, 6), [0], 1, False)],
    aten._fft_r2c.default: [call(x(6, 4, 3), [1, 2], 0, True), call(x(4, 6), [0], 1, False)],
    aten._fft_c2r.default: [call(cplx(6, 4, 3), [1, 2], 2, 4), call(cplx(3, 6), [0], 1, 5)],
    aten.stft.default: [
        call(x(6, 24), 8, None, None, None, False, None, True),
        call(x(4, 24), 8, 4, 6, unit(6), False, True, False),
        call(x(24), 8, return_complex=True),
    ],
}

_ONE_DIM = [call(x(6, 4), 0), call(x(6, 4, 3), -1, True), call(x(4, 6, 1), 0)]
_ORDERS = [call(x(6, 4), order, [1]) for order in (1, 2, 3, 0, float("inf"), -float("inf"))]

PARTS: dict[Any, list[Sample]] = {
    aten.linalg_vector_norm.default: [
        call(x(6, 4)),
        call(x(6, 4, 3), 1, [-1, 0], True),
        call(torch.zeros(4, 6, dtype=torch.float64), 2, [1]),
        *_ORDERS,
    ],
    aten.norm.ScalarOpt_dim: [call(x(6, 4), 2, [1]), call(x(6, 4), None, [0], True), call(x(6, 4), 0, [0])],
    aten.norm.Scalar: [call(x(6, 4), 2), call(x(6), 0)],
    aten.logsumexp.default: [call(x(4, 1, 6), [0]), call(x(6, 4, 3), [-1, 0], True), call(x(3, 12), [1])],
    aten.prod.default: [call(x(6, 4)), call(x(12)), call(ints(3, 6))],
    aten.prod.dim_int: _ONE_DIM,
    **dict.fromkeys((aten.any.dim, aten.all.dim), [call(flags(6, 4), 0), call(flags(6, 4, 3), -1, True)]),
    **dict.fromkeys((aten.any.dims, aten.all.dims), [call(flags(6, 4, 3), [0, 2]), call(flags(6, 4))]),
    **dict.fromkeys((aten.any.default, aten.all.default), [call(flags(6, 4)), call(flags(6) | True), call(ints(2, 6))]),
    aten.nansum.default: [call(x(6, 4)), call(x(6, 4), [1]), call(torch.tensor([1.0, float("nan"), 2.0, 3.0] * 3))],
    aten.nanmedian.default: [call(x(5, 3))],
    aten.nanmedian.dim: [call(x(6, 4), 0), call(x(5, 6), -2, True)],
    aten.mode.default: [call(ints(3, 6, 4)), call(ints(3, 6, 4), 0, True)],
    aten.kthvalue.default: [call(x(6, 4), 2), call(x(4, 6), 3, 0, True)],
    aten._safe_softmax.default: [call(x(6, 4), -1), call(x(4, 6, 1), 0)],
    aten.addr.default: [call(x(6, 4), x(6), x(4)), call(x(4), x(6), x(4), beta=2, alpha=0.5)],
    aten.vdot.default: [call(x(6), x(6)), call(cplx(6), cplx(6))],
}

_TAKEN = distinct(24, 6)
_PLACES = torch.arange(4).view(2, 2).repeat(6, 4, 1, 1) * 3

PLACES: dict[Any, list[Sample]] = {
    aten.take.default: [call(x(6, 4), _TAKEN), call(x(6, 4), ints(24, 3, 4))],
    aten.index_reduce.default: [
        call(x(6, 4), 0, ints(6, 6), above(6, 4), "amax"),
        call(above(6, 4), 1, ints(4, 3), above(6, 3), "mean", include_self=False),
    ],
    aten.index_fill.int_Tensor: [call(x(6, 4), 0, distinct(6, 4), torch.tensor(1.5, dtype=torch.float64))],
    aten.scatter.reduce: [call(x(6, 4), 1, distinct(4, 4).repeat(6, 1), x(6, 4), reduce="add", still=(0, 2))],
    aten.scatter.value_reduce: [call(x(6, 4), 1, ints(4, 6, 3), 2.0, reduce="multiply", still=(0,))],
    aten._unsafe_index.Tensor: [call(x(6, 4), [ints(6, 12)]), call(x(6, 4, 3), [None, ints(4, 6)])],
    aten._unsafe_index_put.default: [call(x(6, 4), [None, ints(4, 6)], x(6, 6), True)],
    aten.floor_divide.Scalar: [call(x(6, 4), 0.5, still=(0,)), call(ints(9, 6), 2)],
    aten.isin.Tensor_Scalar: [call(ints(4, 6, 4), 2)],
    aten.adaptive_max_pool3d.default: [call(x(6, 4, 4, 4, 4), [2, 2, 2])],
    aten._upsample_nearest_exact1d.vec: [call(x(6, 4, 3), None, [2.0])],
    aten._upsample_nearest_exact3d.vec: [call(x(6, 4, 2, 2, 2), None, [2.0, 2.0, 2.0])],
    aten._upsample_lanczos2d_aa.vec: [call(x(6, 4, 3, 3), [4, 5], False, None)],
    aten.grid_sampler_2d.default: [call(x(6, 4, 3, 3), unit(6, 2, 4, 2), 0, 0, False)],
    aten.grid_sampler_3d.default: [call(x(6, 4, 3, 3, 3), unit(6, 2, 4, 2, 3), 0, 0, False)],
    aten.affine_grid_generator.default: [
        call(x(6, 2, 3), [6, 1, 3, 2], False),
        call(x(4, 3, 4), [4, 1, 2, 2, 2], True),
    ],
    aten.max_unpool2d.default: [call(x(6, 4, 2, 2), _PLACES, [4, 4]), call(x(4, 2, 2), _PLACES[0], [4, 4])],
    aten.max_unpool3d.default: [
        call(x(6, 4, 1, 2, 2), _PLACES.unsqueeze(2), [2, 4, 4], [2, 2, 2], [0, 0, 0]),
    ],
    aten.renorm.default: [call(x(6, 4), 2, 0, 1.0), call(x(4, 6, 3), 1, -2, 0.5)],
}
