"""The field forms of Fourier transforms: products with the matrix of roots of unity, whose entries are numbers.

An entry is a rational number exactly, and else one by its leading digits, its negative the negative one. So a transform
is linear, with one matrix everywhere; that it is unitary is a law of cosines that the field does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.proof.field_complex import FORMS as OF_COMPLEX
from autopar.proof.field_complex import joined, parts
from autopar.proof.field_tensor import form

NONE, BY_ROOT, BY_SIZE = 0, 1, 2  # how torch numbers what a transform is divided by


def _roots(rows: int, columns: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi j k / size, (rows, columns)."""
    turns = torch.arange(rows)[:, None] * torch.arange(columns) % size
    near = torch.minimum(turns, size - turns)  # equal up to sign are equal to the last digit
    angle = near.double() * (2 * math.pi / size)
    sine = torch.where(turns == near, angle.sin(), -angle.sin())
    sine = torch.where(2 * turns == size, 0.0, sine)
    return angle.cos().to(like.dtype), sine.to(like.dtype)


def _along(re: Tensor, im: Tensor | None, dim: int, forward: bool) -> tuple[Tensor, Tensor]:
    size = re.shape[dim]
    cosine, sine = _roots(size, size, size, re)
    sine = -sine if forward else sine

    def turned(x: Tensor, by: Tensor) -> Tensor:
        return torch.matmul(x.movedim(dim, -1), by).movedim(-1, dim)

    if im is None:
        return turned(re, cosine), turned(re, sine)
    return turned(re, cosine) - turned(im, sine), turned(re, sine) + turned(im, cosine)


def _scale(sizes: Sequence[int], normalization: int) -> float:
    count = math.prod(sizes)
    return 1.0 if normalization == NONE else 1 / math.sqrt(count) if normalization == BY_ROOT else 1 / count


def _complex_to_complex(x: Tensor, dims: Sequence[int], normalization: int, forward: bool) -> Tensor:
    re, im = parts(x)
    for dim in dims:
        re, im = _along(re, im, dim, forward)
    scale = _scale([x.shape[dim] for dim in dims], normalization)
    return joined(re * scale, im * scale)


@form("_fft_r2c")
def _real_to_complex(x: Tensor, dims: Sequence[int], normalization: int, onesided: bool) -> Tensor:
    re, im = x, None
    for dim in reversed(dims):
        re, im = _along(re, im, dim, True)
        if onesided and dim == dims[-1]:
            half = x.shape[dim] // 2 + 1
            re, im = re.narrow(dim, 0, half), im.narrow(dim, 0, half)
    assert im is not None, "a transform has dims"
    scale = _scale([x.shape[dim] for dim in dims], normalization)
    return joined(re * scale, im * scale)


def _complex_to_real(x: Tensor, dims: Sequence[int], normalization: int, last: int) -> Tensor:
    """Of half a spectrum; the other half are its conjugates."""
    re, im = parts(x)
    for dim in dims[:-1]:
        re, im = _along(re, im, dim, False)
    dim, half = dims[-1], last // 2 + 1
    cosine, sine = _roots(half, last, last, re)
    weights = torch.full((half, 1), 2.0, dtype=cosine.dtype)
    weights[0] = 1.0
    if last % 2 == 0:
        weights[-1] = 1.0
    re, im = (part.narrow(dim, 0, half).movedim(dim, -1) for part in (re, im))
    found = torch.matmul(re, weights * cosine) - torch.matmul(im, weights * sine)
    sizes = [last if d == dim else x.shape[d] for d in dims]
    return found.movedim(-1, dim) * _scale(sizes, normalization)


OF_COMPLEX |= {"_fft_c2c": _complex_to_complex, "_fft_c2r": _complex_to_real}


@form("stft")
def spectrogram(
    x: Tensor, size: int, hop: int | None = None, window_size: int | None = None, window: Tensor | None = None,
    normalized: bool = False, onesided: bool | None = None, return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Tensor:  # fmt: skip
    """stft as torch documents it: (rows, samples) -> (rows, frequencies, frames)."""
    frames = x.unfold(-1, size, hop or size // 4)
    if window is not None:
        before = (size - len(window)) // 2
        frames = frames * torch.nn.functional.pad(window, (before, size - len(window) - before))
    half = not frames.dtype.is_complex if onesided is None else onesided
    normalization = BY_ROOT if normalized else NONE
    found = torch.ops.aten._fft_r2c.default(frames, [frames.dim() - 1], normalization, half).transpose(-1, -2)
    return found if return_complex else torch.view_as_real(found)
