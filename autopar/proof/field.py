"""The prime field of 2^31 - 1: numbers in it, hash functions on it, exact products and sums.

An element is an int64 number from 0 to PRIME - 1, or, for what is no number, one of four negative codes:
``LOWEST`` (a finite number that hides a score, such as ``finfo.min``), ``NEGATIVE`` and ``POSITIVE`` (infinities) and
``UNDEFINED``. Codes are rare; who adds or compares has to ask for them (:func:`has_codes`).

Sums and products of integers and of rational numbers are those of the field, exactly. Every other function is a hash
function: two programs that apply it to equal arguments get equal results, and to others, results that have nothing to
do with each other. (Probabilistic testing of polynomial identities: Schwartz 1980, Zippel 1979; with hashes for what
is no polynomial, as in Mirage, OSDI'25, and TrainVerify, SOSP'25.)
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRIME = 2**31 - 1
LOWEST, NEGATIVE, POSITIVE, UNDEFINED = -1, -2, -3, -4
HIDES = -9999.0  # a number as low as this hides a score
STEPS = 12  # of a continued fraction
CHUNK = 128  # terms of a product of matrices that float64 adds exactly: 2^16 * 2^30 * 2^7 = 2^53
_I64, _F64 = torch.int64, torch.float64
_seed = [0]


@contextmanager
def hashing(seed: int) -> Iterator[None]:
    """Within this context the hash functions are those of ``seed``."""
    before = _seed[0]
    _seed[0] = seed
    try:
        yield
    finally:
        _seed[0] = before


# ---------------------------------------------------------------- numbers


@functools.lru_cache(maxsize=4096)
def _number(value: float) -> int:
    return int(embedded(torch.tensor(value, dtype=_F64), hides=False))


def number(value: float | int | bool) -> int:
    """A Python number as an element: a rational one with a small denominator exactly, others by their leading digits.

    Two floats that are equal up to rounding give one element; the negative of a number gives the negative element.
    """
    if isinstance(value, bool | int):
        return int(value) % PRIME
    return _number(value)


def embedded(x: Tensor, *, hides: bool = True) -> Tensor:
    """A tensor of numbers as elements, see :func:`number`. ``hides``: a very low number becomes ``LOWEST``."""
    if not x.dtype.is_floating_point:
        return x.to(_I64) % PRIME
    wide = x.double()
    precise = x.dtype is _F64
    found, known = _rational(wide, 2.0**14 if precise else 512.0, 1e-11 if precise else 2e-7)
    if not bool(known.all()):
        found = torch.where(known, found, _by_digits(wide, 36 if precise else 20))
        codes = torch.full_like(found, UNDEFINED)
        codes = codes.masked_fill(wide == math.inf, POSITIVE).masked_fill(wide == -math.inf, NEGATIVE)
        found = torch.where(wide.isfinite(), found, codes)
    if hides:
        found = found.masked_fill((wide <= HIDES) & wide.isfinite(), LOWEST)
    return found


def _rational(x: Tensor, most: float, within: float) -> tuple[Tensor, Tensor]:
    """The fractions that ``x`` is, up to rounding, and where it is one; ``most``: the largest denominator."""
    whole = x.round()
    known = ((x - whole).abs() <= within * x.abs().clamp(min=1)) & (x.abs() < 2.0**53)
    top, bottom = torch.where(known, whole, 0), torch.ones_like(x)
    left = ~known & x.isfinite() & (x.abs() < 2.0**38) & (x != 0)
    if bool(left.any()):
        value = torch.where(left, x, 0.5)
        a = value.floor()
        rest = value - a
        h, h_before, k, k_before = a, torch.ones_like(a), torch.ones_like(a), torch.zeros_like(a)
        for _ in range(STEPS):
            a = torch.where(rest > 1e-14, 1 / rest, 1e15).floor().clamp(max=1e15)
            rest = torch.where(rest > 1e-14, 1 / rest, 1e15) - a
            h, h_before, k, k_before = a * h + h_before, h, a * k + k_before, k
            found = left & (k <= most) & ((value - h / k).abs() <= within * value.abs())
            top, bottom = torch.where(found, h, top), torch.where(found, k, bottom)
            known, left = known | found, left & ~found & (k <= most)
            if not bool(left.any()):
                break
    ratio = top.to(_I64) % PRIME
    if bool((bottom != 1).any()):
        ratio = ratio * inverse(bottom.to(_I64)) % PRIME
    return ratio, known


def _by_digits(x: Tensor, digits: int) -> Tensor:
    mantissa, exponent = torch.frexp(torch.where(x.isfinite(), x.abs(), 0.0))
    leading = (mantissa * 2.0**digits).round().to(_I64)
    element = _element(_mixed(leading * 4096 + exponent.to(_I64)))
    return torch.where(x < 0, -element % PRIME, element)


def signed(x: Tensor) -> Tensor:
    """int64 -> float64, exactly: the representatives around zero, by which elements are compared; codes in order."""
    around = torch.where(x > PRIME // 2, x - PRIME, x)
    if has_codes(x):
        for code, place in ((LOWEST, -(2**40)), (NEGATIVE, -(2**41)), (POSITIVE, 2**41), (UNDEFINED, 2**42)):
            around = around.masked_fill(x == code, place)
    return around.double()


def unsigned(x: Tensor) -> Tensor:
    """The inverse of :func:`signed`."""
    found = x.to(_I64)
    element = found % PRIME
    if bool((x.abs() >= 2.0**40).any()):
        for code, place in ((LOWEST, -(2**40)), (NEGATIVE, -(2**41)), (POSITIVE, 2**41), (UNDEFINED, 2**42)):
            element = element.masked_fill(found == place, code)
    return element


def has_codes(x: Tensor) -> bool:
    return x.numel() > 0 and bool((x < 0).any())


def drawn(shape: Sequence[int], name: str, seed: int) -> Tensor:
    """Random elements, none of them zero, which ``name`` and ``seed`` determine."""
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 20) + seed)
    return torch.randint(1, PRIME, tuple(shape), generator=generator)


# ---------------------------------------------------------------- arithmetic


def inverse(x: Tensor) -> Tensor:
    """1 / x by Fermat, 0 for 0: x^(2^31 - 3)."""
    two = x * x % PRIME
    three = two * x % PRIME  # 2^2 - 1
    power, length, blocks = three, 2, {2: three}
    while length < 16:  # x^(2^n - 1) from two of half the length
        power = _squared(power, length) * power % PRIME
        length *= 2
        blocks[length] = power
    power = _squared(power, 8) * blocks[8] % PRIME  # 24
    power = _squared(power, 4) * blocks[4] % PRIME  # 28
    power = _squared(power, 1) * x % PRIME  # 29
    return _squared(power, 2) * x % PRIME  # 2^31 - 4 + 1


def _squared(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = x * x % PRIME
    return x


def power(x: Tensor, exponent: int) -> Tensor:
    """x^exponent for any whole number."""
    if exponent < 0:
        return inverse(power(x, -exponent))
    found = torch.ones_like(x)
    while exponent:
        if exponent & 1:
            found = found * x % PRIME
        x, exponent = x * x % PRIME, exponent >> 1
    return found


def total(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False) -> Tensor:
    """Sums over ``dims`` (None: all), of up to 2^32 elements each."""
    return (x.sum(list(dims), keepdim=keepdim) if dims else x.sum()) % PRIME


def product(a: Tensor, b: Tensor) -> Tensor:
    """``torch.matmul`` of elements, by two exact products in float64: (..., m, k) and (..., k, n)."""
    high, low = (a >> 16).double(), (a & 0xFFFF).double()
    wide = torch.where(b > PRIME // 2, b - PRIME, b).double()
    found = None
    for start in range(0, a.shape[-1], CHUNK):
        some = slice(start, start + CHUNK)
        upper, lower = ((part[..., some] @ wide[..., some, :]).to(_I64) for part in (high, low))
        part = ((upper % PRIME << 16) + lower) % PRIME
        found = part if found is None else (found + part) % PRIME
    return a.new_zeros((*a.shape[:-1], b.shape[-1])) if found is None else found


# ---------------------------------------------------------------- hash functions


def hashed(name: str, *operands: Tensor, attributes: Any = ()) -> Tensor:
    """A random function of the operands, one for each name and attributes, elementwise (they broadcast)."""
    salt = zlib.crc32(repr((name, attributes, _seed[0])).encode())
    state = torch.tensor(salt * 0x1E3779B1 + 0x7F4A7C15, dtype=_I64)
    for operand in operands:
        state = _mixed(state ^ _mixed(operand + salt))
    return _element(state)


def folded(x: Tensor) -> Tensor:
    """One number for the elements of the last dim and their places; not yet an element of the field."""
    places = _mixed(torch.arange(1, x.shape[-1] + 1))
    return _mixed(_mixed(x ^ places).sum(-1))


def _element(state: Tensor) -> Tensor:
    return ((state >> 20) & 0x7FFFFFFF) % PRIME


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on int64, which wraps around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
