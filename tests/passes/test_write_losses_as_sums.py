"""Mean losses as sums over counts: the same numbers in float64, and which losses are left as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.frontend.numerics import input_tensors, run_graph
from autopar.frontend.trace import trace
from autopar.ir.node import value
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.passes.write_losses_as_sums import write_losses_as_sums
from tests.passes.canonical import Function, counts

LOGITS = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
TARGET = torch.tensor([1, 8, -100, 3, 3, 0])
WEIGHT = torch.rand(9, dtype=torch.float64)


def rewritten(model: nn.Module, *args: Tensor) -> Program:
    return write_losses_as_sums(trace(model, args))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"weight": WEIGHT}, {"label_smoothing": 0.2}, {"ignore_index": 3}], ids=lambda o: "".join(o)
)
def test_cross_entropy_is_the_same_number(reduction: str, options: dict[str, Any]) -> None:
    target = TARGET.where(TARGET != -100, 3) if "ignore_index" in options else TARGET
    model = Function(lambda x, t: F.cross_entropy(x, t, reduction=reduction, **options))
    program = rewritten(model, LOGITS, target)
    assert counts(program)["op.cross_entropy_sums"] == 1 and not counts(program)["aten.cross_entropy_loss"]
    assert counts(program)["aten.div.Tensor"] == (reduction == "mean")
    (found,) = run_graph(program.graph, input_tensors(program, model, (LOGITS, target), {}))
    assert abs(found - model(LOGITS, target)) < 1e-13


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_squares_are_operators_that_have_rules(reduction: str) -> None:
    model = Function(lambda x, y: F.mse_loss(x, y, reduction=reduction))
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    program = rewritten(model, x, y)
    assert not counts(program)["aten.mse_loss"]
    (found,) = run_graph(program.graph, [x, y])
    assert torch.equal(found, model(x, y))


def test_one_loss_for_each_token_or_probabilities_as_targets_stay() -> None:
    for reduction, target in (("none", TARGET), ("mean", torch.rand(6, 9, dtype=torch.float64))):
        program = rewritten(Function(lambda x, t: F.cross_entropy(x, t, reduction=reduction)), LOGITS, target)  # noqa: B023
        assert counts(program)["aten.cross_entropy_loss"] == 1


def test_losses_of_16_bits_are_summed_in_32_and_cast_back() -> None:
    text = """program mesh()
  logits = param logits                             : bf16[6,9]
  target = input                                    : i64[6]
  loss   = aten.cross_entropy_loss(logits, target)  : bf16[]
  return loss
"""
    program = write_losses_as_sums(parse(text))
    (loss,) = program.returned
    assert value(loss).dtype == torch.bfloat16 and value(loss).requires_grad
    assert [str(value(node).dtype) for node in loss.all_input_nodes] == ["torch.float32"]
    count = next(node for node in program.graph.nodes if node.name == "getitem_1")
    assert not value(count).requires_grad, "no gradient goes through how many tokens there are"
