"""The canonical form: each pass alone on its docstring, then whole models against eager in float64."""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopar.frontend.numerics import bind, promote_float32, run_graph
from autopar.frontend.trace import trace
from autopar.ir.node import origin, value, values
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.ir.text import operator_name
from tests.hugging_face import MODELS, build, errors

aten = torch.ops.aten
PASSES = ("canonicalize", "lower_row_indexing", "fold_constants", "recognise_causal_masks")


def rewrite(name: str, program: Program) -> Program:
    result = getattr(importlib.import_module(f"autopar.passes.{name}"), name)(program)
    assert isinstance(result, Program)
    return result


def canonical(program: Program) -> Program:
    for name in PASSES:
        program = rewrite(name, program)
    return program


def traced(model: nn.Module, *args: Any) -> Program:
    return trace(model, args)


def counts(program: Program) -> Counter[str]:
    return Counter(operator_name(node.target) for node in program.graph.nodes if node.op == "call_function")


def attentions(program: Program) -> list[tuple[Any, ...]]:
    attention = aten.scaled_dot_product_attention.default
    return [node.args[3:] for node in program.graph.nodes if node.target is attention]


class Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


# ---------------------------------------------------------------- each pass alone


@pytest.mark.parametrize("name", PASSES)
def test_docstring(name: str) -> None:
    text = inspect.getdoc(importlib.import_module(f"autopar.passes.{name}")) or ""
    before, after = (parse("program mesh()\n" + part) for part in text.split("before:\n")[1].split("after:\n"))
    for target in before.constants:
        before.constants[target].copy_(torch.ones(16, 16).tril().bool())  # type: ignore[attr-defined]
    assert str(rewrite(name, before)) == str(after)


def body(program: Program) -> list[str]:
    return [line.strip() for line in str(canonical(program)).splitlines()[1:]]


def test_writing_a_number_under_a_mask_is_a_choice_for_each_element() -> None:
    def masked(x: torch.Tensor, rows: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x[x > 1] = 0
        x[rows] = -1.0
        return torch.index_put(x, (rows,), value)

    x, rows, number = torch.randn(4, 3), torch.tensor([True, False, True, False]), torch.tensor([5.0])
    program = canonical(traced(Function(masked), x, rows, number))
    assert counts(program)["aten.where.self"] == 3 and not counts(program)["aten.index_put"]
    (found,) = run_graph(program.graph, bind(program, Function(masked), (x, rows, number), {}))
    assert torch.equal(found, masked(x, rows, number))


def test_rows_written_by_position_stay_a_write() -> None:
    def written(x: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.concat([x.index_put((rows,), values), torch.index_put(x, (rows > 1,), values[:2])])

    x, rows, values = torch.randn(4, 3), torch.tensor([0, 3, 2, 1]), torch.randn(4, 3)
    program = canonical(traced(Function(written), x, rows, values))
    assert counts(program)["aten.index_put"] == 2 and counts(program)["aten.cat"] == 1


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


@pytest.mark.parametrize("picks", [torch.tensor([1, -1, 0, 4]), torch.tensor([[1, 4], [-2, 0], [0, 0], [3, -5]])])
def test_rows_that_each_pick_their_own_are_gathered(picks: torch.Tensor) -> None:
    rows = (4,) if picks.dim() == 1 else (4, 1)
    model, x = Function(lambda x, picks: x[torch.arange(4).reshape(rows), picks]), torch.randn(4, 5, 3)
    program = canonical(traced(model, x, picks))
    assert counts(program)["aten.gather"] == 1 and not counts(program)["aten.index.Tensor"]
    (found,) = run_graph(program.graph, [x, picks])
    assert torch.equal(found, model(x, picks))


def test_rows_that_all_pick_the_same_are_selected() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:  # as Hugging Face looks up attention masks
        rows, places = torch.arange(4)[:, None, None, None], torch.arange(5)[None, None, None, :]
        return x[rows, places]

    x = torch.randn(4, 6) > 0
    program = canonical(traced(Function(masked), x))
    assert counts(program)["aten.index_select"] == 1 and not counts(program)["aten.index.Tensor"]
    (found,) = run_graph(program.graph, bind(program, nn.Identity(), (x,), {}))
    assert torch.equal(found, masked(x))


def test_an_index_that_pairs_other_rows_stays() -> None:
    x, picks = torch.randn(5, 5, 3), torch.tensor([1, 0, 2, 4])
    program = canonical(traced(Function(lambda x, picks: x[torch.arange(4), picks]), x, picks))
    assert counts(program)["aten.index.Tensor"] == 1


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


# ---------------------------------------------------------------- constants


def test_rows_of_a_mask_that_are_equal_are_one_row() -> None:
    def masked(x: torch.Tensor) -> torch.Tensor:
        keep = torch.arange(16) % 3 > 0
        return x * keep[None, :].expand(4, 16).clone()

    program = canonical(traced(Function(masked), torch.randn(4, 16)))
    assert [tuple(tensor.shape) for tensor in program.constants.values()] == [(1, 16)]
    assert counts(program) == {"aten.mul.Tensor": 1}


def test_users_that_do_not_broadcast_get_an_expand() -> None:
    def embedded(x: torch.Tensor) -> torch.Tensor:
        return F.embedding(torch.arange(16)[None].repeat(4, 1), x)

    x = torch.randn(16, 8)
    program = canonical(traced(Function(embedded), x))
    assert [tuple(tensor.shape) for tensor in program.constants.values()] == [(1, 16)]
    (found,) = run_graph(program.graph, bind(program, Function(embedded), (x,), {}))
    assert torch.equal(found, embedded(x))


def test_equal_constants_are_one() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(8) + x.exp() * torch.arange(8)

    assert len(canonical(traced(Function(twice), torch.randn(4, 8))).constants) == 1


def test_random_numbers_and_buffers_are_not_folded() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            return x + torch.rand(8) * self.steps

    program = canonical(traced(Noisy(), torch.randn(4, 8)))
    assert counts(program)["aten.rand"] == 1 and not program.constants


def test_big_masks_cost_little_memory() -> None:
    """A mask of 8 x 4096 x 4096 float64 would take 1 GB; only one row of the batch is ever made."""

    def masked(x: torch.Tensor) -> torch.Tensor:
        position = torch.arange(4096)
        keep = (position[None, :, None] >= position[None, None, :]).expand(8, 4096, 4096).clone()
        bias = torch.where(keep, torch.zeros((), dtype=torch.float64), torch.tensor(-torch.inf, dtype=torch.float64))
        return x[:, :1, :1] + bias[:, :1]

    with torch.device("meta"):
        x = torch.empty(8, 4096, 4096, dtype=torch.float64)
    program = canonical(traced(Function(masked), x))
    assert sum(tensor.nbytes for tensor in program.constants.values()) <= 4096 * 8


# ---------------------------------------------------------------- causal masks


def attend(mask: torch.Tensor | None) -> Program:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        built = None if mask is None else torch.arange(mask.numel()).reshape(mask.shape) * 0 + mask
        return F.scaled_dot_product_attention(q, k, v, built)

    queries, keys = mask.shape[-2:] if mask is not None else (8, 8)
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 4, keys, 16), torch.randn(2, 4, keys, 16)
    program = canonical(traced(Function(attention), q, k, v))
    (found,) = run_graph(program.graph, bind(program, Function(attention), (q, k, v), {}))
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


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", MODELS)
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


def test_windows_stay_masks() -> None:
    model, batch = build("mistral")
    program = canonical(trace(model, (), batch))
    masks = [mask for mask, _, _ in attentions(program)]
    assert len(set(masks)) == 1 and value(masks[0]).shape == (1, 1, 16, 16)


def test_bert_attends_to_everything() -> None:
    model, batch = build("bert")
    assert attentions(canonical(trace(model, (), batch))) == [(None, 0.0, False)] * 2
