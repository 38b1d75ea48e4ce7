"""Loops over the experts that some row chose: the loop over all experts, with the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.check import Reference
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.loops_over_experts import EXPERTS, Gated, Loop, Mixture
from tests.passes.test_stack_experts import products, program, rows
from tests.selection import slow_but


def mixtral(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As transformers wrote it from 4.40 to 4.56."""
    out = torch.zeros_like(x)
    mask = F.one_hot(chosen, num_classes=len(experts)).permute(2, 1, 0)
    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for number in hit:
        layer = experts[number]
        place, token = torch.where(mask[number].squeeze(0))
        state = x[None, token].reshape(-1, x.shape[-1])
        out.index_add_(0, token, (layer(state) * weights[token, place, None]).to(x.dtype))
    return out


def indexed(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As transformers wrote it later: one more number marks rows of no expert."""
    out = torch.zeros_like(x)
    mask = F.one_hot(chosen, num_classes=len(experts) + 1).permute(2, 1, 0)
    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for number in hit:
        number = number[0]
        if number == len(experts):
            continue
        place, token = torch.where(mask[number])
        out.index_add_(0, token, experts[number](x[token]) * weights[token, place, None])
    return out


def unique(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number in chosen.unique():
        token, place = torch.where(chosen == number)
        out[token] += weights[token, place, None] * experts[int(number)](x[token])
    return out


def listed(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number in torch.unique(chosen.flatten()).tolist():
        mask = (chosen == number).any(dim=-1)
        weight = (weights * (chosen == number)).sum(-1)
        out[mask] += weight[mask].unsqueeze(-1) * experts[number](x[mask])
    return out


def where_any(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    masks = chosen.unsqueeze(-1) == torch.arange(len(experts))
    (hit,) = torch.where(masks.any(1).any(0))
    for number in hit:
        token, place = torch.where(masks[..., number])
        out[token] += weights[token, place, None] * experts[number.item()](x[token])
    return out


SOME, OTHERS = (mixtral, unique), (indexed, listed, where_any)


@pytest.mark.parametrize(
    "loop",
    [*SOME, *(pytest.param(loop, marks=pytest.mark.slow) for loop in OTHERS)],
    ids=lambda loop: loop.__name__,
)
def test_all_experts_as_two_products(loop: Loop) -> None:
    assert len(products(program(Mixture(loop)))) == 2


@pytest.mark.parametrize(
    "loop",
    [mixtral, *(pytest.param(loop, marks=pytest.mark.slow) for loop in (unique, *OTHERS))],
    ids=lambda loop: loop.__name__,
)
def test_experts_that_no_row_chose(loop: Loop) -> None:
    reference = Reference(Mixture(loop, unused=True), rows())
    assert reference.check(Mesh(ep=2), Plan(zero=1)).worst <= 1e-12


def busy(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Experts with few rows are left out, which the rows alone do not tell."""
    out = torch.zeros_like(x)
    mask = F.one_hot(chosen, num_classes=len(experts)).permute(2, 1, 0)
    for number in (mask.sum(dim=(-1, -2)) > 4).nonzero().flatten().tolist():
        place, token = torch.where(mask[number])
        out.index_add_(0, token, experts[number](x[token]) * weights[token, place, None])
    return out


def others(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The expert that is hit is not the one that runs."""
    out = torch.zeros_like(x)
    mask = F.one_hot(chosen, num_classes=len(experts)).permute(2, 1, 0)
    for number in (mask.sum(dim=(-1, -2)) > 0).nonzero()[:, 0]:
        after = (int(number) + 1) % len(experts)
        place, token = torch.where(mask[after])
        out.index_add_(0, token, experts[after](x[token]) * weights[token, place, None])
    return out


@pytest.mark.parametrize("loop", slow_but([0], [busy, others]), ids=lambda loop: loop.__name__)
def test_what_the_rows_do_not_tell_is_exact(loop: Loop) -> None:
    reference = Reference(Mixture(loop, Gated, unused=True), rows())
    assert reference.check(Mesh(dp=2)).worst <= 1e-12


def adds_all(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number in chosen.unique():
        out = out + experts[int(number)](x)
    return out


def test_a_round_that_does_more_is_refused() -> None:
    with pytest.raises(TraceError, match=r"for number in chosen.unique\(\)") as info:
        trace(Mixture(adds_all), (), rows())
    assert "Way out: " in str(info.value) and str(info.value).count("\n") < 15
    assert EXPERTS > 1
