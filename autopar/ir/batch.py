"""Which dims of the inputs are the batch and the sequence, and over how many ranks the batch is split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from autopar.mesh import BATCH_AXES, Mesh


def data_ways(mesh: Mesh) -> int:
    """The number of parts into which the batch is split over ranks."""
    ways = 1
    for axis in BATCH_AXES:
        ways *= mesh.size(axis)
    return ways


def batch_dims(shapes: Sequence[tuple[str, Sequence[int]]], given: Mapping[str, int | None]) -> list[int | None]:
    """The batch dim of each input (name, shape); None for an input without one.

    It is the ``given`` one, else dim 0 if that is as long as the dim 0 of most other inputs.
    """
    lengths = Counter(shape[0] for name, shape in shapes if len(shape) and name not in given)
    usual = lengths.most_common(1)[0][0] if lengths else None
    return [given[name] if name in given else 0 if len(shape) and shape[0] == usual else None for name, shape in shapes]


def sequence_dims(
    tensors: Sequence[tuple[str, Sequence[int], bool]], given: Mapping[str, int | None]
) -> list[int | None]:
    """The sequence dim of each input (name, shape, whether it is floating); None for an input without one.

    It is the ``given`` one, else dim 1 of whole numbers (batch, positions) and floats (batch, positions, width).
    """
    return [
        given[name] if name in given else 1 if len(shape) == (3 if floating else 2) and shape[1] > 1 else None
        for name, shape, floating in tensors
    ]
