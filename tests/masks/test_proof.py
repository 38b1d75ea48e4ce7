"""The check of a recognised mask finds what is wrong with it, small or large."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from autopar.ir.evaluate import known_constants
from autopar.masks.proof import Elements, agrees
from autopar.operators.predicates import parse
from tests.passes.canonical import Function, rewrite, traced

LONG = 2048  # more elements than are all compared


def mask_of(build: Callable[..., Tensor], *given: Tensor) -> tuple[fx.Node, dict[fx.Node, Tensor], list[fx.Node]]:
    program = rewrite("lower_row_indexing", rewrite("canonicalize", traced(Function(build), *given)))
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.users]
    return program.returned[0], known_constants(program), [node for node in inputs if "c_" not in node.name]


def causal_window(valid: Tensor) -> Tensor:
    n = valid.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return ((j <= i) & (i - j < n // 4) & valid[:, None, :])[:, None]


@pytest.mark.parametrize("length", (16, LONG))
def test_only_the_right_formula_agrees(length: int) -> None:
    mask, constants, (valid,) = mask_of(causal_window, torch.ones(2, length, dtype=torch.bool))
    width = length // 4
    wrong = (
        f"j<=i & i-j<{width + 1} & v0[j]", f"j<=i & i-j<{width - 1} & v0[j]", f"j<=i+1 & i-j<{width} & v0[j]",
        f"j<=i-1 & i-j<{width} & v0[j]", f"j<=i & i-j<{width}", f"j<=i & i-j<{width} & v0[i]", "v0[j]", "j<=i & v0[j]",
        f"i-j<{width} & v0[j]", f"j<=i & i-j<{width} & !v0[j]",
    )  # fmt: skip

    def holds(text: str) -> bool:
        formula = parse(text)
        return agrees(mask, formula, [valid] * len(formula.vectors), None, [valid], constants, (length, length))

    assert holds(f"j<=i & i-j<{width} & v0[j]")
    assert not any(map(holds, wrong))


def test_a_bias_is_compared_too() -> None:
    def build(table: Tensor, other: Tensor) -> Tensor:
        i, j = torch.arange(16)[:, None], torch.arange(16)[None]
        return torch.where(j <= i, table, -torch.inf) + 0 * other.sum()

    mask, constants, (table, other) = mask_of(build, torch.randn(4, 16, 16), torch.randn(4, 16, 16))
    assert agrees(mask, parse("j<=i"), [], table, [table, other], constants, (16, 16))
    assert not agrees(mask, parse("j<=i"), [], other, [table, other], constants, (16, 16))
    assert not agrees(mask, parse("j<=i+1"), [], table, [table, other], constants, (16, 16))


def test_elements_are_those_of_the_whole() -> None:
    def build(x: Tensor, picks: Tensor) -> Tensor:
        y = x.reshape(4, 3, 2).permute(2, 0, 1)[:, 1:, :].transpose(0, 1)  # (3, 2, 3)
        y = y.index_select(2, picks)[1].expand(5, 2, 3).tril(-1) + torch.arange(3).unsqueeze(0) - x[0, 0]
        return y.gather(2, picks.expand(5, 2, 3)).triu(0)

    x, picks = torch.randn(4, 6), torch.tensor([2, 0, 1])
    mask, constants, (first, second) = mask_of(build, x, picks)
    elements = Elements({**constants, first: x, second: picks}, (), 3)
    where = tuple(torch.meshgrid(torch.arange(5), torch.arange(2), torch.arange(3), indexing="ij"))
    assert torch.equal(elements.at(mask, where), build(x, picks))
    assert torch.equal(elements.at(mask, tuple(at[1:2, :, :2] for at in where)), build(x, picks)[1:2, :, :2])
