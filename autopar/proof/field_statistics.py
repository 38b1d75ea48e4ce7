"""The field forms of order statistics and histograms, and of the two parts of a float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autopar.proof import field
from autopar.proof.field_tensor import FORMS, FieldTensor, NoFieldForm, form, hashed
from autopar.proof.field_uninterpreted import note_unknown

aten = torch.ops.aten

EXPONENTS = 64  # of a float: as many as 2 to their power has room for


def _has_undefined(x: Tensor) -> bool:
    return bool((x.elements == field.UNDEFINED).any() if isinstance(x, FieldTensor) else x.isnan().any())


@form("nanmedian.dim")
def nanmedian(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Where nothing is undefined, the median."""
    if _has_undefined(x):
        raise NoFieldForm("nanmedian of undefined numbers has no form in the field")
    return aten.median.dim(x, dim, keepdim)  # type: ignore[no-any-return]


@form("frexp")
def frexp(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two functions of each element; that their product is the element is known to nobody."""
    exponent = hashed("exponent", x).elements % EXPONENTS - EXPONENTS // 2
    return hashed("mantissa", x), exponent.to(torch.int32)


@form("histc")
def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """How many elements are in each bin, which an element decides, and where no bounds are given the outermost two."""
    bounds = [x.flatten().amin(), x.flatten().amax()] if min == max else []
    place = hashed("bin", x, *bounds, attributes=(bins, float(min), float(max))).elements % bins
    counts = torch.zeros(bins, dtype=torch.int64).index_add(0, place.flatten(), torch.ones_like(place).flatten())
    return FieldTensor(counts % field.PRIME, x.dtype)


def quantile(
    x: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Tensor:
    """Between the two elements around the place ``q * (n - 1)``, which torch computes in the dtype of ``x``.

    Where that rounds their weights, so that the two are no longer one together, nothing is known of the derivative.
    """
    if _has_undefined(x):
        raise NoFieldForm("a quantile of undefined numbers has no form in the field")
    ends = [1] * x.dim() if dim is None else None
    x, dim = (x.flatten(), 0) if dim is None else (x, dim)
    last = x.shape[dim] - 1
    ordered = aten.sort.default(x, dim)[0]
    fractions = torch.as_tensor(q, dtype=x.dtype)

    def one(fraction: Tensor) -> Tensor:
        place = fraction * last
        place = {"lower": place.floor(), "higher": place.ceil(), "nearest": place.round()}.get(interpolation, place)
        low, high = (ordered.select(dim, int(end)) for end in (place.floor(), place.ceil()))
        weight = torch.full_like(place, 0.5) if interpolation == "midpoint" else place - place.floor()
        if int(field.embedded(weight) + field.embedded(1 - weight)) % field.PRIME != 1:
            note_unknown("aten.quantile, whose weights are rounded,")
        found: Tensor = low + (high - low) * weight
        if keepdim:
            found = found.reshape(ends) if ends is not None else found.unsqueeze(dim)
        return found

    return one(fractions) if not fractions.dim() else torch.stack([one(each) for each in fractions])


WRITTEN = {  # composites whose kernels write into memory that elements share
    getattr(packet, overload): quantile
    for packet in (aten.quantile, aten.nanquantile)
    for overload in ("scalar", "default")
}
FORMS |= {"quantile": quantile, "nanquantile": quantile}
