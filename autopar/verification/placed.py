"""The pieces of a tensor on the ranks of an axis, by its placement: cut out, and compared with the whole again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autopar.ir.layout import REPLICATED, Partial, Placement, Split, owned_indices
from autopar.mesh import Mesh
from autopar.simulator.lockstep import REDUCTIONS, Ranks, take

AXIS, OUTER = "tp", "dp"  # the axis that is split; collectives in samples run on the other one
TOLERANCE = {torch.float32: 1e-4, torch.complex64: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # else 1e-12


def pieces(
    whole: Sequence[Tensor], placement: Placement, mesh: Mesh, fill: Callable[..., Tensor], summands: bool = False
) -> Ranks:
    """The piece of each rank; ``fill`` makes padding. R counts as summands where ``summands`` says so (cotangents)."""
    found: Ranks = [None] * mesh.world_size
    for group in mesh.groups(AXIS):
        tensor = whole[mesh.coordinates(group[0])[OUTER]].detach()
        if placement == Partial("sum") and not summands or placement == REPLICATED and summands:
            parts = _summands(tensor, len(group))
        elif isinstance(placement, Split):
            parts = [_part(tensor, placement, i, len(group), fill) for i in range(len(group))]
        else:
            parts = [tensor] * len(group)
        for rank, part in zip(group, parts):
            found[rank] = part.clone()
    return found


def _summands(tensor: Tensor, ways: int) -> list[Tensor]:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        first = [torch.randn_like(tensor) for _ in range(ways - 1)]
    else:
        first = [torch.zeros_like(tensor) if tensor.dtype == torch.bool else torch.randint_like(tensor, 9)] * (ways - 1)
    rest = tensor
    for part in first:
        rest = rest if tensor.dtype == torch.bool else rest - part
    return [*first, rest]


def _part(whole: Tensor, split: Split, position: int, ways: int, fill: Callable[..., Tensor]) -> Tensor:
    part = take(whole, split, position, ways)
    own = len(owned_indices(whole.shape[split.dim], split, position, ways))
    padding = part.narrow(split.dim, own, part.shape[split.dim] - own)
    padding.copy_(fill(whole, list(padding.shape)))
    return part


def garbage(like: Tensor, shape: list[int]) -> Tensor:
    """Possible contents of padding: any finite numbers, zero among them."""
    values = torch.tensor([0.0, -1.3, 0.7] if like.dtype.is_floating_point else [0.0], dtype=torch.float64)
    count = math.prod(shape)
    return values.repeat(count)[:count].reshape(shape).to(like.dtype)


def zeros(like: Tensor, shape: list[int]) -> Tensor:
    return like.new_zeros(shape)


def compare(
    what: str, ranks: Ranks, placement: Placement, whole: Sequence[Tensor], mesh: Mesh, padding: bool = False
) -> None:
    for group in mesh.groups(AXIS):
        expected = whole[mesh.coordinates(group[0])[OUTER]].detach()
        parts = [ranks[rank].detach() for rank in group]
        if isinstance(placement, Partial):
            combine = REDUCTIONS[placement.op]
            total = parts[0]
            for part in parts[1:]:
                total = combine(total, part)
            _same(what, total, expected)
        elif isinstance(placement, Split):
            for position, part in enumerate(parts):
                own = owned_indices(expected.shape[placement.dim], placement, position, len(parts))
                real = part.narrow(placement.dim, 0, len(own))
                _same(f"{what} on rank {position}", real, expected.index_select(placement.dim, own))
                rest = part.narrow(placement.dim, len(own), part.shape[placement.dim] - len(own))
                assert not padding or not rest.any(), f"{what}: {rest.abs().max()} comes out of padding"
        else:
            for position, part in enumerate(parts):
                _same(f"{what} on rank {position}", part, expected)


def _same(what: str, found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype} instead of {expected.dtype}"
    if expected.dtype.is_floating_point or expected.dtype.is_complex:
        finite = expected[torch.isfinite(expected)]
        scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
        tolerance = TOLERANCE.get(expected.dtype, 1e-12) * scale
        close = torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True)
        assert close, f"{what}: off by {float((found - expected).abs().max()):.3g}"
    else:
        assert torch.equal(found, expected), f"{what}: differs"
