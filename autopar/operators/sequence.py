"""Attention of one part of a sequence that is split over the ranks of an axis, in three forms.

    ring_attention     keys and values travel around the ranks, a tile is computed of each part (Liu et al. 2023)
    rows_attention     keys and values are whole, queries are this rank's rows
    hybrid_attention   heads are dealt out to groups of neighbours, and a ring goes over the groups (Fang and Zhao 2024)

    q (..., H, S / ways, D)   k, v (..., Hkv, T / ways, D or Dv); of rows_attention k, v (..., Hkv, T, D or Dv)
    bias: bool (True takes part) or float (added), broadcastable to (..., H, S / ways, T)
    vectors (..., T): what ``where`` compares at positions, whole on every rank; ``where``: what a query at i sees of
    a key at j, as :mod:`autopar.operators.predicates` writes it
    rank: this rank's position on the axis; mirrored: the parts are in zig-zag order (``Split.mirrored``)
    steps: the distances on the ring, but 0, at which some rank has a tile that ``where`` does not hide

They are composites: they have collectives inside, which stand as lines in the graphs that ranks run. Forward saves the
rank's own part and the log-sum-exp only, and backward sends keys and values around a second time, with their
gradients: memory is that of S / ways in both directions. Parts are merged by their log-sum-exp; in half precision the
merged output is kept in float32 until the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.operators.attention_operands import HALVES
from autopar.operators.attention_tile import MERGE, TILE, TILE_BACKWARD
from autopar.operators.registry import composite

OPS: Any = torch.ops.autopar  # the collectives among them are those of autopar/ir/collectives.py
WHOLE_KEYS = -1  # the step of a tile of which the keys are those of all ranks


@composite
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    rank: Tensor,
    axis: str,
    ways: int,
    mirrored: bool,
    where: str,
    steps: Sequence[int],
    scale: float | None,
) -> Tensor:
    """Attention of this rank's rows while the keys and values of all ranks pass by: (..., H, S / ways, Dv)."""
    tile = (rank, where, ways, mirrored, scale)
    found: Tensor = _Ring.apply(q, k, v, bias, axis, tuple(steps), tile, *vectors)  # type: ignore[no-untyped-call]
    return found


@composite
def rows_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    vectors: Sequence[Tensor],
    rank: Tensor,
    ways: int,
    mirrored: bool,
    where: str,
    scale: float | None,
) -> Tensor:
    """Attention of this rank's rows to whole keys and values: (..., H, S / ways, Dv)."""
    tile = (rank, where, ways, mirrored, scale)
    found: Tensor = _Rows.apply(q, k, v, bias, tile, *vectors)  # type: ignore[no-untyped-call]
    return found


@composite
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    vectors: Sequence[Tensor],
    rank: Tensor,
    inner: str,
    outer: str,
    heads: int,
    ways: int,
    mirrored: bool,
    where: str,
    steps: Sequence[int],
    scale: float | None,
) -> Tensor:
    """The ring over the ``ways`` groups ``outer``, of all rows of the ``heads`` neighbours ``inner``, each its heads.

    ``rank``: the position on ``outer``. Each rank of a group has the heads' part and the rows of its whole group.
    """
    sequence = [-2 if mirrored else 1, 1]

    def to_heads(x: Tensor) -> Tensor:
        if heads == 1:
            return x
        found: Tensor = OPS.all_to_all(x, inner, heads, [x.dim() - 2, *sequence], [x.dim() - 3, 1, 1])
        return found

    q, k, v = map(to_heads, (q, k, v))
    out = ring_attention(q, k, v, None, vectors, rank, outer, ways, mirrored, where, steps, scale)
    if heads == 1:
        return out
    found: Tensor = OPS.all_to_all(out, inner, heads, [out.dim() - 3, 1, 1], [out.dim() - 2, *sequence])
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        axis: str,
        steps: tuple[int, ...],
        tile: tuple[Any, ...],
        *vectors: Tensor,
    ) -> Tensor:
        rank, where, ways, mirrored, scale = tile
        out, logsumexp = q, q
        at, keys, values = 0, k, v
        for step, further in zip((0, *steps), (*steps, None)):
            if further is not None:  # the next part travels while this tile is computed
                coming = [OPS.shift(x, axis, ways, further - at) for x in (keys, values)]
            part = TILE(q, keys, values, bias, list(vectors), rank, where, step, ways, mirrored, scale)
            if step == 0:
                out, logsumexp = (part[0].float() if q.dtype in HALVES else part[0]), part[1]
            else:
                out, logsumexp = MERGE(out, logsumexp, *part)
            if further is not None:
                at, (keys, values) = further, coming
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, rank, out, logsumexp, *vectors)
        ctx.rest = (axis, steps, where, ways, mirrored, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, bias, rank, out, logsumexp, *vectors = ctx.saved_tensors
        axis, steps, where, ways, mirrored, scale = ctx.rest
        wants_bias = ctx.needs_input_grad[3]
        at, before, keys, values = 0, 0, k, v
        total: list[Tensor] = []  # of q and of the bias
        passing: list[Tensor] = []  # of the keys and values that are here now, from the ranks they have been at
        for step, further in zip((0, *steps), (*steps, None)):
            if further is not None:
                coming = [OPS.shift(x, axis, ways, further - at) for x in (keys, values)]
            if step:
                passing = [OPS.shift(x, axis, ways, step - before) for x in passing]
            dq, dk, dv, dbias = TILE_BACKWARD(
                grads[0], q, keys, values, bias, vectors, out, logsumexp,
                rank, where, step, ways, mirrored, scale, wants_bias,
            )  # fmt: skip
            own = [dq, dbias] if wants_bias else [dq]
            total = [a + b for a, b in zip(total, own)] if total else own
            passing = [a + b for a, b in zip(passing, (dk, dv))] if passing else [dk, dv]
            before = step
            if further is not None:
                at, (keys, values) = further, coming
        dk, dv = (OPS.shift(x, axis, ways, -before) if before else x for x in passing)
        return (total[0], dk, dv, total[1] if wants_bias else None, None, None, None, *[None] * len(vectors))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tile: tuple[Any, ...], *vectors: Tensor
    ) -> Tensor:
        rank, where, ways, mirrored, scale = tile
        out, logsumexp = TILE(q, k, v, bias, list(vectors), rank, where, WHOLE_KEYS, ways, mirrored, scale)
        ctx.save_for_backward(q, k, v, bias, rank, out, logsumexp, *vectors)
        ctx.rest = (where, WHOLE_KEYS, ways, mirrored, scale)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, bias, rank, out, logsumexp, *vectors = ctx.saved_tensors
        wants_bias = ctx.needs_input_grad[3]
        dq, dk, dv, dbias = TILE_BACKWARD(
            grads[0], q, k, v, bias, vectors, out, logsumexp, rank, *ctx.rest, wants_bias
        )  # fmt: skip
        return (dq, dk, dv, dbias if wants_bias else None, None, *[None] * len(vectors))
