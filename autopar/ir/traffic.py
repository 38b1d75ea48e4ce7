"""The bytes that one rank sends in a collective."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.ir.collectives import row_of
from autopar.ir.node import Value
from autopar.mesh import Mesh


def bytes_of(kind: Value, mesh: Mesh | None = None) -> int:
    """Bytes of one tensor: of the whole, or of the part that a rank of ``mesh`` holds."""
    return math.prod(kind.shape if mesh is None else kind.layout.local_shape(mesh)) * kind.dtype.itemsize


def moved_bytes(name: str, ways: int, sent: int) -> int:
    """Bytes that one rank sends in the collective ``name`` over ``ways`` ranks; ``sent``: the size of its argument."""
    return row_of(name).sends(ways, sent)


@dataclass(frozen=True)
class Transfer:
    """How often one rank ran a collective on an axis in a phase, and the bytes that it sent."""

    phase: str  # "forward" or "backward"
    axis: str
    name: str
    operations: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.phase:<8} {self.axis:<4} {self.name:<20} {self.operations:>6} x {self.bytes:>15,} bytes"


def count_text(number: float) -> str:
    """``812``, ``1.44 M``, ``35.3 G``."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def size_text(size: float) -> str:
    """Bytes as people read them: ``0``, ``812 B``, ``1.44 MB``, ``35.3 GB``."""
    return f"{count_text(size)}B" if size >= 1e3 else f"{size:.0f} B" if size else "0"
