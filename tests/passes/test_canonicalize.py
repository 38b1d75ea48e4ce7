"""The canonical form: one operator after another, then whole models against eager in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopar.frontend.numerics import promote_float32
from autopar.frontend.trace import trace
from autopar.ir.node import origin, values
from autopar.ir.tables import InputKind
from tests.hugging_face import MODELS, build, errors
from tests.passes.canonical import Function, aten, attentions, body, canonical, counts, traced
from tests.selection import slow_but


def test_identities_vanish() -> None:
    def identities(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous().clone().to(torch.float32).view(4, 8).expand(4, 8).transpose(0, 0).permute(0, 1)
        x = F.dropout(F.dropout(x, 0.5, training=False), 0.0) + 0
        x = torch.cat([x[:, 0:]]) * 1.0
        return x.to(torch.float64).to(torch.float32).detach().relu()

    assert counts(canonical(traced(Function(identities), torch.randn(4, 8)))) == {"aten.relu": 1}


def test_a_cast_that_rounds_stays() -> None:
    program = canonical(traced(Function(lambda x: x.bfloat16().float()), torch.randn(4, 8)))
    assert counts(program) == {"aten._to_copy": 2}


def test_reshapes_are_one_with_full_sizes() -> None:
    program = canonical(
        traced(Function(lambda x: x.flatten(1).unflatten(1, (2, -1)).view(-1, 2)), torch.randn(4, 2, 6))
    )
    (node,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert node.target is aten.reshape.default and node.args[1] == [24, 2]


def test_pieces_that_hold_nothing_vanish() -> None:
    def halves(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.cat([x, x[:, 8:]], -1), x[:, 8:], x.relu()], -1)

    program = canonical(traced(Function(halves), torch.randn(4, 8)))
    assert counts(program) == {"aten.relu": 1, "aten.cat": 1}


def test_active_dropout_stays_one_operator() -> None:
    program = canonical(traced(nn.Dropout(0.5), torch.randn(4, 8)))
    assert counts(program) == {"aten.dropout": 1}


def test_new_nodes_carry_type_and_origin() -> None:
    model, batch = build("llama")
    program = canonical(trace(model, (), batch))
    operators = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(values(node) for node in operators)
    assert all(origin(node).source and "eval_with_key" not in origin(node).source for node in operators)
    attention = next(node for node in operators if "attention" in node.name)
    assert origin(attention).module == "model.layers.0.self_attn"


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", slow_but([2, 4, 6, 8], MODELS))
def test_model_is_exact(name: str) -> None:
    model, batch = build(name)
    with promote_float32():
        program = trace(model, (), batch)
        short = canonical(program)
    assert len(short.graph.nodes) < len(program.graph.nodes)
    assert max(errors(program, model, batch)) <= 1e-12
    assert max(errors(short, model, batch)) <= 1e-12
    assert not [line for line in body(short) if "_assert" in line or "aten.view" in line or "aten.clone" in line]


def test_llama_layer() -> None:
    """No mask is left, and one more layer costs less than 55 operators."""
    sizes = []
    for layers in (1, 2):
        model, batch = build("llama", torch.float32, num_hidden_layers=layers)
        program = canonical(trace(model, (), batch))
        assert attentions(program) == [(None, 0.0, True)] * layers
        assert counts(program)["aten.linear"] == 7 * layers + 1
        sizes.append(len([node for node in program.graph.nodes if node.op == "call_function"]))
    assert sizes[1] - sizes[0] < 55
    assert [entry.target for entry in program.inputs if entry.kind is InputKind.INPUT] == ["input_ids", "labels"]


def test_bert_attends_to_everything() -> None:
    model, batch = build("bert")
    assert attentions(canonical(trace(model, (), batch))) == [(None, 0.0, False)] * 2
