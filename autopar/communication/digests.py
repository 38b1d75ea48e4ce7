"""Numbers by which ranks compare tensors without sending them: equal for equal bits, in every process."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor

WORDS = 1 << 18  # that are summed at a time: 2 MB
SHORT = 1 << 15  # bytes, of which a digest of the bytes takes less time than the operators, each of which starts slowly
BITS = 62


def digest(tensor: Tensor) -> int:
    """A whole number of 62 bits that depends on each bit of ``tensor`` and on its place; 0 without data.

    A sum of 64-bit words, each times an odd number of its place, modulo 2**64, in one pass over memory; of a short one
    on the CPU BLAKE2b (RFC 7693). Bits that are equal in different dtypes give the same number.
    """
    if tensor.is_meta or tensor.layout is not torch.strided:
        return 0
    flat = _bytes(tensor.detach())
    if flat.is_cpu and 0 < len(flat) <= SHORT:
        return int.from_bytes(blake2b(flat.numpy().data, digest_size=8).digest(), "little") & (1 << BITS) - 1
    words = _words(flat)
    while len(words) > 1:
        parts = [_sum(block) for block in words.split(WORDS)]  # type: ignore[no-untyped-call]
        words = torch.stack(parts)
    found = int(words.item()) if len(words) else 0
    return (found ^ found >> 31) & (1 << BITS) - 1


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _words(flat: Tensor) -> Tensor:
    """Bytes as int64, with zeros at the end where they do not fill the last."""
    rest = -len(flat) % 8
    if rest or flat.storage_offset() % 8:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    return flat.view(torch.int64)


def _sum(words: Tensor) -> Tensor:
    mixed = words >> 29
    mixed ^= words  # a sign alone would be lost in the highest bit
    mixed *= _odd(1 << (len(words) - 1).bit_length(), words.device)[: len(words)]
    return mixed.sum()


@lru_cache(maxsize=32)
def _odd(most: int, device: torch.device) -> Tensor:
    return torch.arange(1, 2 * most, 2, device=device) * 0x5851F42D4C957F2D
