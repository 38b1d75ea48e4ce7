"""``if mask.any():`` around an expert: one graph for both answers, or a refusal with the line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.check import Reference
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.mesh import Mesh
from tests.loops_over_experts import Loop, Mixture
from tests.passes.test_stack_experts import products, program, rows
from tests.selection import slow_but


def if_any(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = (chosen == number).any(dim=-1)
        if mask.any():
            weight = (weights * (chosen == number)).sum(-1)
            out[mask] += weight[mask].unsqueeze(-1) * expert(x[mask])
    return out


def unless_none(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = chosen == number
        if mask.sum() == 0:
            continue
        token, place = torch.where(mask)
        out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
    return out


def of_one_hot(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    masks = F.one_hot(chosen, len(experts)).bool().permute(2, 0, 1)
    for number in range(len(experts)):
        if not masks[number].any():
            continue
        token, place = masks[number].nonzero(as_tuple=True)
        out[token] += experts[number](x[token]) * weights[token, place, None]
    return out


@pytest.mark.parametrize(
    "loop",
    [if_any, *(pytest.param(loop, marks=pytest.mark.slow) for loop in (unless_none, of_one_hot))],
    ids=lambda loop: loop.__name__,
)
def test_all_experts_as_two_products(loop: Loop) -> None:
    assert len(products(program(Mixture(loop)))) == 2


def test_experts_that_no_row_chose() -> None:
    assert Reference(Mixture(if_any, unused=True), rows()).check(Mesh(dp=2)).worst <= 1e-12


def of_another(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        if (chosen == (number + 1) % len(experts)).any():
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
    return out


def until_none(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = chosen == number
        if not mask.any():
            break
        token, place = torch.where(mask)
        out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
    return out


def nested(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    if (chosen == 0).any():
        mask = chosen == 1
        if mask.any():
            token, place = torch.where(mask)
            out.index_add_(0, token, experts[1](x[token]) * weights[token, place, None])
    return out


def kept(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    first, second = bool((chosen == 0).any()), bool((chosen == 1).any())
    if first and second:
        token, place = torch.where(chosen == 1)
        out.index_add_(0, token, experts[1](x[token]) * weights[token, place, None])
    return out


def more(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = chosen == number
        if mask.any():
            token, place = torch.where(mask)
            out = out.index_add(0, token, expert(x[token]) * weights[token, place, None]) + 1
    return out


@pytest.mark.parametrize(
    "loop", slow_but([0, 2, 3], [of_another, until_none, nested, kept, more]), ids=lambda loop: loop.__name__
)
def test_another_branch_is_refused(loop: Loop) -> None:
    with pytest.raises(TraceError) as info:
        trace(Mixture(loop), (), rows())
    text = str(info.value)
    assert "Way out: " in text and text.count("\n") < 15 and ("test_any_branches.py" in text or "loops_over" in text)
