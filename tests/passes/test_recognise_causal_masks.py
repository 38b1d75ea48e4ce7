"""Masks: which are causality or nothing, which stay, and the same numbers either way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from autopar.frontend.numerics import input_tensors, promote_float32, run_graph
from autopar.frontend.trace import trace
from autopar.ir.node import value
from autopar.ir.program import Program
from tests.hugging_face import build, errors
from tests.passes.canonical import Function, attentions, canonical, traced


def attend(mask: torch.Tensor | None) -> Program:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        built = None if mask is None else torch.arange(mask.numel()).reshape(mask.shape) * 0 + mask
        return F.scaled_dot_product_attention(q, k, v, built)

    queries, keys = mask.shape[-2:] if mask is not None else (8, 8)
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 4, keys, 16), torch.randn(2, 4, keys, 16)
    program = canonical(traced(Function(attention), q, k, v))
    (found,) = run_graph(program.graph, input_tensors(program, Function(attention), (q, k, v), {}))
    torch.testing.assert_close(found, attention(q, k, v))
    return program


def additive(keep: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, hidden)


TRIANGLE = torch.ones(8, 8, dtype=torch.bool).tril()
WINDOW = TRIANGLE & ~TRIANGLE.tril(-4)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("dims", [2, 4])
def test_a_causal_mask_becomes_is_causal(hidden: float, dims: int) -> None:
    mask = additive(TRIANGLE, hidden)
    program = attend(mask if dims == 2 else mask.expand(2, 1, 8, 8))
    assert attentions(program) == [(None, 0.0, True)] and not program.constants


def test_a_mask_that_hides_nothing_is_dropped() -> None:
    assert attentions(attend(torch.zeros(2, 1, 8, 8))) == [(None, 0.0, False)]


@pytest.mark.parametrize(
    "mask",
    [
        additive(WINDOW, -torch.inf),
        additive(TRIANGLE.T, -torch.inf) + torch.where(TRIANGLE, 0.0, 0.0),
        additive(TRIANGLE[-4:], -torch.inf),  # fewer queries than keys
        additive(TRIANGLE, -1.0),
        torch.where(TRIANGLE, 0.5, -torch.inf),
    ],
    ids=["window", "anti-causal", "rectangle", "soft", "biased"],
)
def test_other_masks_stay(mask: torch.Tensor) -> None:
    program = attend(mask)
    ((found, _, causal),) = attentions(program)
    assert found is not None and not causal and value(found).shape[-2:] == mask.shape[-2:]


def test_a_mask_from_an_input_stays() -> None:
    model, batch = build("llama")
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 12:] = 0
    with promote_float32():
        program = canonical(trace(model, (), batch))
    assert all(mask is not None and not causal for mask, _, causal in attentions(program))
    assert max(errors(program, model, batch)) <= 1e-12
