"""The field forms of experts and routing, bags, weight normalisation and recurrent layers.

They are written in operators that have forms: so each runs on numbers too, and there it is the operator
(``tests/proof/test_field_forms.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.operators.recurrent import autograd_within
from autopar.proof.field_tensor import FORMS, form

aten = torch.ops.aten

FORMS["autopar::straight_through"] = lambda value, surrogate: value.clone()

# ---------------------------------------------------------------- experts


def _seats(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, int]:
    """The rows that some expert takes, their places in a table of (experts, most rows of one), and that number."""
    known = (ids < experts).nonzero().flatten()
    order = known[ids[known].argsort(stable=True)]
    counts = ids[order].bincount(minlength=experts)
    most, first = int(counts.max()) if len(order) else 0, counts.cumsum(0) - counts
    turn = torch.arange(len(order)) - first[ids[order]]
    return order, ids[order] * most + turn, most


def _seated(x: Tensor, count: int, order: Tensor, places: Tensor, experts: int, most: int) -> Tensor:
    """(experts, most, width): the rows ``order`` of ``count`` ones, for which those of ``x`` stand."""
    rows = x.index_select(0, order // (count // max(len(x), 1)))
    return x.new_zeros(experts * most, x.shape[1]).index_copy(0, places, rows).unflatten(0, (experts, most))  # type: ignore[no-untyped-call, no-any-return]


@form("autopar::expert_linear")
def expert_linear(rows: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    order, places, most = _seats(ids, len(weight))
    out = rows.new_zeros(len(ids), weight.shape[2])
    if not len(order):
        return out
    found = torch.bmm(_seated(rows, len(ids), order, places, len(weight), most), weight).flatten(0, 1)
    return out.index_copy(0, order, found.index_select(0, places))


@form("autopar::expert_outer")
def expert_outer(left: Tensor, right: Tensor, ids: Tensor, experts: int) -> Tensor:
    order, places, most = _seats(ids, experts)
    if not len(order):
        return left.new_zeros(experts, left.shape[1], right.shape[1])
    one, other = (_seated(x, len(ids), order, places, experts, most) for x in (left, right))
    return torch.bmm(one.transpose(1, 2), other)


@form("_grouped_mm")
def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """torch's product of groups of rows, or of columns, that end at ``offsets``."""
    if offsets is None:
        return torch.bmm(a, b)
    if b.dim() == 3:
        ids = torch.searchsorted(offsets.long(), torch.arange(len(a)), right=True)
        return expert_linear(a, b, ids)
    ids = torch.searchsorted(offsets.long(), torch.arange(a.shape[1]), right=True)
    return expert_outer(a.t(), b, ids, len(offsets))


# ---------------------------------------------------------------- pooled look-ups


def _members(
    table: Tensor, ids: Tensor, offsets: Any, bags: Any, weights: Any, rank: Any, mode: str, padding_idx: int
) -> Any:
    """(rows, shares): the row of this rank's table for each id, and how much of it is in each bag, (B, n)."""
    flat = ids.reshape(-1)
    if offsets is None:
        owner = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        member = owner == torch.arange(len(ids))[:, None]
    else:
        ends = torch.cat([offsets, torch.tensor([len(flat)])])
        places = torch.arange(len(flat))
        member = (places >= ends[bags][:, None]) & (places < ends[bags + 1][:, None])
    member = member & (flat != padding_idx)
    share: Tensor = member.to(torch.float64)
    if mode == "mean":
        share = share / member.sum(1, keepdim=True).clamp(min=1)
    rows = flat if rank is None else flat - rank * len(table)
    here = (rows >= 0) & (rows < len(table))
    share = torch.where(here, share, 0.0).to(table.dtype)
    if weights is not None:
        share = share * weights.reshape(-1)
    return rows.clamp(0, len(table) - 1), share, member & here


@form("autopar::embedding_bags")
def embedding_bags(
    table: Tensor,
    ids: Tensor,
    offsets: Any,
    bags: Any,
    weights: Any,
    rank: Any,
    mode: str,
    padding_idx: int,
    total: int = 0,
) -> Tensor:
    if mode == "max":
        raise NotImplementedError("the largest of a bag")
    rows, share, _ = _members(table, ids, offsets, bags, weights, rank, mode, padding_idx)
    return torch.matmul(share, table.index_select(0, rows))


@form("autopar::embedding_bags_backward")
def embedding_bags_backward(
    grad: Tensor,
    table: Tensor,
    ids: Tensor,
    offsets: Any,
    bags: Any,
    weights: Any,
    rank: Any,
    mode: str,
    padding_idx: int,
    total: int = 0,
) -> tuple[Tensor, Tensor]:
    if mode == "max":
        raise NotImplementedError("the largest of a bag")
    rows, share, member = _members(table, ids, offsets, bags, weights, rank, mode, padding_idx)
    spread = torch.matmul(share.t(), grad)
    of_table = table.new_zeros(table.shape).index_add(0, rows, spread)
    if weights is None:
        return of_table, table.new_empty(0)
    products = torch.matmul(grad, table.index_select(0, rows).t())  # (B, n)
    return of_table, torch.where(member, products, 0.0).sum(0).reshape(weights.shape)


@form("_weight_norm_interface_backward")
def weight_norm_backward(grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of v * g / |v|, with a length for each index of ``dim``."""
    others = [other for other in range(v.dim()) if other != dim % v.dim()]
    lengths = norms.reshape(g.shape)
    of_g = (grad * v).sum(others, keepdim=True) / lengths
    return g / lengths * (grad - v * of_g / lengths), of_g.reshape(g.shape)


@form("_native_batch_norm_legit_no_training")
def frozen_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the moments that it holds; what is saved of those of the batch is empty."""
    sizes = [-1, *[1] * (x.dim() - 2)]
    found = (x - mean.reshape(sizes)) * (variance + eps).rsqrt().reshape(sizes)
    found = found if weight is None else found * weight.reshape(sizes)
    return found if bias is None else found + bias.reshape(sizes), x.new_zeros([0]), x.new_zeros([0])


# ---------------------------------------------------------------- recurrent layers


@form("autopar::recurrent_layer")
def recurrent_layer(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> tuple[Tensor, Tensor]:
    outs, *_, last = _steps(x, states, weights, cell)
    return outs, last


@form("autopar::recurrent_layer_backward")
def recurrent_layer_backward(
    grad_y: Tensor, grad_last: Tensor, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str
) -> list[Tensor]:
    with autograd_within():
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *states, *weights)]
        count = 1 + len(states)
        outs, _, last = _steps(leaves[0], leaves[1:count], leaves[count:], cell)
        return list(torch.autograd.grad((outs, last), leaves, (grad_y, grad_last)))


def _steps(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> tuple[Tensor, Tensor, Tensor]:
    w_ih, w_hh, *rest = weights
    biases = rest[:2] if len(rest) >= 2 else (None, None)
    projection = rest[-1] if len(rest) % 2 else None
    h, c = states[0], states[-1]
    outs = []
    for row in x:
        given, kept = (_linear(row, w_ih, biases[0]), _linear(h, w_hh, biases[1]))
        if cell == "lstm":
            i, f, g, o = (given + kept).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            h = h if projection is None else torch.matmul(h, projection.t())
        elif cell == "gru":
            (a, b, n), (a_h, b_h, n_h) = given.chunk(3, -1), kept.chunk(3, -1)
            z = (b + b_h).sigmoid()
            fresh = (n + (a + a_h).sigmoid() * n_h).tanh()
            h = fresh + z * (h - fresh)
        else:
            h = (given + kept).tanh() if cell == "rnn_tanh" else (given + kept).relu()
        outs.append(h)
    return torch.stack(outs), h, c if cell == "lstm" else h


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = torch.matmul(x, weight.t())
    return found if bias is None else found + bias
