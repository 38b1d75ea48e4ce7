"""Graphs that are linear, affine or neither. (The table of operators: tests/ir/test_linear_operators.py.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.frontend.linearity import not_linear

aten = torch.ops.aten


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def verdict(function: Callable[..., Any], *fixed: Tensor) -> str | None:
    graph = make_fx(torch.func.functionalize(function))(*fixed, x(4, 3))
    return not_linear(graph, [node for node in graph.graph.nodes if node.op == "placeholder"][-1:])


def parts(c: Tensor, g: Tensor) -> list[Tensor]:
    a, b, _ = g.split(1, dim=1)
    written = g.clone()
    written[:, 0] = (a * c[:, :1]).squeeze(1)
    written[c > 0] = 0
    written[:, 1].mul_(3)
    whole = torch.zeros_like(g)
    whole[1] = g[0]
    return [torch.cat([a, b, torch.zeros_like(a)], 1) @ c.t(), written, whole - g.sum(0), torch.zeros(3), g / c.exp()]


LINEAR: dict[str, Callable[..., Any]] = {
    "parts": parts,
    "formulas": lambda c, g: aten.gelu_backward(g, c),
    "softmax": lambda c, g: aten._softmax_backward_data(g, c.softmax(-1), -1, torch.float64),
    "where": lambda c, g: torch.where(c > 0, g, 0.0),
    "written over": lambda c, g: torch.ones_like(c).copy_(g),
    "nothing": lambda c, g: None,
}
OTHER: dict[str, tuple[Callable[..., Any], str]] = {
    "clamp": (lambda c, g: g.clamp(-1, 1), "aten.clamp.default, which is not linear"),
    "sign": (lambda c, g: g.sign(), "aten.sign.default, which is not linear"),
    "square": (lambda c, g: g * g, "aten.mul.Tensor, which is not linear"),
    "detached square": (lambda c, g: g * g.detach(), "aten.mul.Tensor, which is not linear"),
    "chosen by itself": (lambda c, g: torch.where(g > 0, g, 0.0), "aten.gt.Scalar, which is not linear"),
    "floor": (lambda c, g: torch.div(g, 2, rounding_mode="floor"), "aten.div.Tensor_mode, which is not linear"),
    "integers": (lambda c, g: g.to(torch.int64), "aten._to_copy.default, which is not linear"),
    "drawn": (lambda c, g: torch.bernoulli(g.sigmoid()), "aten.sigmoid.default, which is not linear"),
    "noise": (lambda c, g: torch.bernoulli(g.abs() / 9), "aten.abs.default, which is not linear"),
    "plus one": (lambda c, g: g + 1, "aten.add.Tensor adds something"),
    "plus a tensor": (lambda c, g: c + g, "aten.add.Tensor adds something"),
    "next to a tensor": (lambda c, g: torch.cat([c, g]), "aten.cat.default adds something"),
    "where else": (lambda c, g: torch.where(c > 0, g, 1.0), "aten.where.self adds something"),
    "fixed": (lambda c, g: c, "does not depend on the incoming gradient"),
    "ones": (lambda c, g: [g, torch.ones_like(g)], "input 1 does not depend on the incoming gradient"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    assert verdict(LINEAR[name], x(4, 3)) is None


@pytest.mark.parametrize("name", OTHER)
def test_not_linear(name: str) -> None:
    function, expected = OTHER[name]
    assert expected in str(verdict(function, x(4, 3)))
