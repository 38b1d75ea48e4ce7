"""Attention of a part of the queries to a part of the keys, under a formula over positions.

    attention_tile(q, k, v, bias, vectors, rank, where, step, ways, mirrored, scale) -> (out, logsumexp)
    attention_tile_backward(grad, q, k, v, bias, vectors, out, logsumexp, rank, where, step, ways, mirrored, scale,
                            bias_grad) -> (dq, dk, dv, dbias)
    merge_tiles(out, logsumexp, other, other_logsumexp) -> (out, logsumexp)

    q (..., H, Sq / ways, D)   the rows of ``rank``, a 0-d int64 tensor (it is read: keep it on the CPU); None: rank 0
    k (..., Hkv, Sk / ways, D), v (..., Hkv, Sk / ways, Dv)   step >= 0: the part of rank (rank - step) % ways
    k (..., Hkv, Sk, D), v (..., Hkv, Sk, Dv)                 step == -1: the whole
    bias      bool (True takes part) or float (added), broadcastable to (..., H, Sq / ways, Sk): all columns
    vectors   (..., S), whole; leading dims broadcast against those of q without its heads
    where     a formula (:mod:`autopar.operators.predicates`); i counts the whole queries, j the whole keys
    dbias     of the bias's shape, zeros in the columns of other steps: they are added up; empty without ``bias_grad``

Parts are those of :mod:`autopar.operators.attention_blocks`. A row is merged from its blocks by their sums of
exponentials (Milakov and Gimelshein 2018; Liu et al. 2023), in float32 for inputs of 16 bits. A row that may attend to
nothing has zeros and the log-sum-exp -inf. Backward takes ``out`` and ``logsumexp`` of the merged attention.
A merge has the dtypes of its first operands: a ring of 16 bits merges in float32 if it casts ``out`` first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autopar.operators.attention import ATTENTION, ATTENTION_BACKWARD, plain_backward
from autopar.operators.attention_blocks import Block, Span, blocks, joined, spans
from autopar.operators.attention_operands import accumulated, empty
from autopar.operators.predicates import Vectors, parse
from autopar.operators.registry import library

_TILE = "Tensor[] vectors, Tensor? rank, str where, int step, int ways, bool mirrored, float? scale"
_SCHEMAS = (
    f"attention_tile(Tensor q, Tensor k, Tensor v, Tensor? bias, {_TILE}) -> (Tensor, Tensor)",
    "attention_tile_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor[] vectors, Tensor out, "
    "Tensor logsumexp, Tensor? rank, str where, int step, int ways, bool mirrored, float? scale, bool bias_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "merge_tiles(Tensor out, Tensor logsumexp, Tensor other, Tensor other_logsumexp) -> (Tensor, Tensor)",
)
_LIBRARY = library(*_SCHEMAS)
TILE = torch.ops.autopar.attention_tile.default
TILE_BACKWARD = torch.ops.autopar.attention_tile_backward.default
MERGE = torch.ops.autopar.merge_tiles.default

WORTH_READING = 2**22  # scores whose computation outlasts the wait for vectors on a device


# ---------------------------------------------------------------- shapes and derivative


@torch.library.register_fake("autopar::attention_tile", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=accumulated(q.dtype))


@torch.library.register_fake("autopar::attention_tile_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _backward_shape(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = torch.empty_like(bias) if bias is not None and rest[-1] else q.new_empty(0)
    return empty(q, q.shape[-1]), empty(k, k.shape[-1]), empty(v, v.shape[-1]), dbias


@torch.library.register_fake("autopar::merge_tiles", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _merge_shape(out: Tensor, logsumexp: Tensor, other: Tensor, other_logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(logsumexp)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, vectors, rank, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, bias, rank, *output, *vectors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    q, k, v, bias, rank, out, logsumexp, *vectors = ctx.saved_tensors
    nothing = ([None] * len(vectors), *[None] * 6)
    if grad is None:
        return (None, None, None, None, *nothing)
    wanted = bool(ctx.needs_input_grad[3])
    found = TILE_BACKWARD(grad, q, k, v, bias, vectors, out, logsumexp, rank, *ctx.rest, wanted)
    return (*found[:3], found[3] if wanted else None, *nothing)


torch.library.register_autograd("autopar::attention_tile", _derivative, setup_context=_remember, lib=_LIBRARY)

# ---------------------------------------------------------------- kernels


def _plan(
    q: Tensor, k: Tensor, bias: Tensor | None, vectors: Vectors, rank: Tensor | None,
    where: str, step: int, ways: int, mirrored: bool,
) -> list[Block]:  # fmt: skip
    here, formula = 0 if rank is None else int(rank), parse(where)
    _check(q, k, vectors, where, step, ways, mirrored)
    rows = spans(q.shape[-2], here, ways, mirrored)
    columns = spans(k.shape[-2], (here - step) % ways, ways, mirrored) if step >= 0 else spans(k.shape[-2], 0, 1, False)
    readable: Vectors | None = None
    if formula.vectors and (q.device.type == "cpu" or q.shape[-2] * k.shape[-2] >= WORTH_READING):
        readable = [vector.cpu() for vector in vectors]
    found = list(blocks(formula, rows, columns, readable))
    return joined(found) if bias is None else found


def _check(q: Tensor, k: Tensor, vectors: Vectors, where: str, step: int, ways: int, mirrored: bool) -> None:
    numbers = parse(where).vectors
    if numbers and numbers[-1] >= len(vectors):
        raise ValueError(f"attention mask {where!r}: there are {len(vectors)} vectors, and no v{numbers[-1]}")
    longest = max(q.shape[-2] * ways, k.shape[-2] * (ways if step >= 0 else 1))
    for number in numbers:
        if vectors[number].shape[-1] not in (q.shape[-2] * ways, k.shape[-2] * (ways if step >= 0 else 1)):
            raise ValueError(
                f"attention mask {where!r}: v{number} has {vectors[number].shape[-1]} of {longest} positions"
            )
    if mirrored and ways > 1 and (q.shape[-2] % 2 or (step >= 0 and k.shape[-2] % 2)):
        raise ValueError(f"attention: mirrored parts of {q.shape[-2]} rows and {k.shape[-2]} columns are not even")


def _mask(block: Block, q: Tensor, bias: Tensor | None, vectors: Vectors) -> Tensor | None:
    """What hides scores of a block: ``bias`` there, merged with the rest of the formula."""
    if bias is not None:
        bias = bias if bias.shape[-2] == 1 else bias[..., block.rows.here, :]
        bias = bias if bias.shape[-1] == 1 else bias[..., block.columns.whole]
    if not block.rest.clauses:
        return bias
    rows, columns = (
        torch.arange(span.place, span.place + span.length, device=q.device) for span in (block.rows, block.columns)
    )
    shown = block.rest.evaluate(rows, columns, vectors)
    if q.dim() > 3 and shown.dim() > 2:
        shown = shown.unsqueeze(-3)  # heads
    if bias is None:
        return shown
    return bias & shown if bias.dtype is torch.bool else bias.masked_fill(shown.logical_not(), -math.inf)


def _tile(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, vectors: list[Tensor], rank: Tensor | None,
    where: str, step: int, ways: int, mirrored: bool, scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    found = _plan(q, k, bias, vectors, rank, where, step, ways, mirrored)
    if _is_one(found, q, k):
        whole: tuple[Tensor, Tensor] = ATTENTION(q, k, v, _mask(found[0], q, bias, vectors), found[0].causal, scale)
        return whole
    wide = accumulated(q.dtype)
    out = empty(q, v.shape[-1], wide).zero_()
    logsumexp = q.new_full(q.shape[:-1], -math.inf, dtype=wide)
    begun: list[Span] = []
    for block in found:
        rows, columns = block.rows.here, block.columns.here
        more = ATTENTION(
            q[..., rows, :], k[..., columns, :], v[..., columns, :], _mask(block, q, bias, vectors), block.causal, scale
        )
        if any(map(block.rows.overlaps, begun)):
            more = _merged(out[..., rows, :], logsumexp[..., rows], *more)
        out[..., rows, :], logsumexp[..., rows] = more
        begun.append(block.rows)
    return out.to(q.dtype), logsumexp


def _tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, vectors: list[Tensor],
    out: Tensor, logsumexp: Tensor, rank: Tensor | None,
    where: str, step: int, ways: int, mirrored: bool, scale: float | None, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    found, wanted, wide = (
        _plan(q, k, bias, vectors, rank, where, step, ways, mirrored),
        bias if bias_grad else None,
        accumulated(q.dtype),
    )
    if wanted is None and _is_one(found, q, k):
        mask = _mask(found[0], q, bias, vectors)
        grads = ATTENTION_BACKWARD(grad, q, k, v, mask, out, logsumexp, found[0].causal, scale)
        return (*grads, q.new_empty(0))
    total: list[Tensor | None] = [None, None, None]
    dbias = torch.zeros_like(wanted, dtype=wide) if wanted is not None else q.new_empty(0)
    for block in found:
        rows, columns = block.rows.here, block.columns.here
        operands = (
            grad[..., rows, :], q[..., rows, :], k[..., columns, :], v[..., columns, :],
            _mask(block, q, bias, vectors), out[..., rows, :], logsumexp[..., rows], block.causal, scale,
        )  # fmt: skip
        if wanted is None:
            grads = ATTENTION_BACKWARD(*operands)
        else:
            *grads, change = plain_backward(*operands)
            _add_bias(dbias, change, block)
        ends = ((q, block.rows), (k, block.columns), (v, block.columns))
        total = [_plus(one, more, span, x) for one, more, (x, span) in zip(total, grads, ends)]
    dq, dk, dv = (empty(x, x.shape[-1]).zero_() if one is None else one.to(x.dtype) for one, x in zip(total, (q, k, v)))
    return dq, dk, dv, dbias if wanted is None else dbias.to(wanted.dtype)


def _plus(total: Tensor | None, more: Tensor, span: Span, x: Tensor) -> Tensor:
    """The gradient of ``x`` until now with that of a block; the block's own where that is all of ``x``."""
    wide = accumulated(x.dtype)
    if total is None and span.length == x.shape[-2]:
        return more.to(wide)
    total = empty(x, x.shape[-1], wide).zero_() if total is None else total
    total[..., span.here, :] += more
    return total


def _is_one(found: list[Block], q: Tensor, k: Tensor) -> bool:
    """Whether one block is all that there is: its results are those of the tile."""
    return len(found) == 1 and (found[0].rows.length, found[0].columns.length) == (q.shape[-2], k.shape[-2])


def _add_bias(dbias: Tensor, change: Tensor, block: Block) -> None:
    """Add the gradient of a block's scores (..., H, R, C) to that of the bias, summed where the bias is broadcast."""
    part = dbias if dbias.shape[-2] == 1 else dbias[..., block.rows.here, :]
    part = part if part.shape[-1] == 1 else part[..., block.columns.whole]
    part += change.sum_to_size(part.shape)


def _merged(out: Tensor, logsumexp: Tensor, other: Tensor, other_logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    total, wide = torch.logaddexp(logsumexp, other_logsumexp), logsumexp.dtype
    share = torch.exp(other_logsumexp - total).masked_fill(other_logsumexp == -math.inf, 0.0)
    return torch.lerp(out.to(wide), other.to(wide), share.unsqueeze(-1)).to(out.dtype), total


_LIBRARY.impl("attention_tile", _tile, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("attention_tile_backward", _tile_backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("merge_tiles", _merged, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
