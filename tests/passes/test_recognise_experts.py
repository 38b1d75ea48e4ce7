"""Layers of experts: the forms in which they come, what is left alone, whole models."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.analysis.footprint import held, sent
from autopar.check import TOLERANCE, Report, check
from autopar.compiler import split_program
from autopar.frontend.numerics import input_tensors, promote_float32, run_graph
from autopar.ir.program import Program
from autopar.ir.text import operator_name
from autopar.mesh import Mesh
from autopar.operators.experts import EXPERT_LINEAR
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.selection import one_each, slow_but

TOKENS, CHOICES, EXPERTS, WIDTH, INNER = 12, 2, 4, 8, 16
SORTING = {"aten.sort", "aten.argsort", "aten.histc", "aten.index_put", "aten._grouped_mm", "aten.floor_divide"}


class Layer(nn.Module):
    """A router and experts; how rows meet their experts is what the forms below differ in."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 4)
        self.bias = nn.Parameter(torch.randn(EXPERTS, INNER))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(CHOICES)
        return self.mixed(x, weights, ids).square().mean()

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


class Sorted(Layer):
    """Rows sorted by expert, grouped products, the inverse by argsort."""

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        experts, order = ids.flatten().sort()
        ends = F.one_hot(experts, EXPERTS).sum(0).cumsum(0).to(torch.int32)
        y = self.experts(x[order // CHOICES], experts, ends)
        return (y * weights.flatten()[order, None])[order.argsort()].unflatten(0, (-1, CHOICES)).sum(1)

    def experts(self, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        hidden = F.grouped_mm(rows, self.up.transpose(1, 2), offs=ends) + self.bias[experts]
        return F.grouped_mm(F.silu(hidden), self.down, offs=ends)


class Added(Sorted):
    """Sorted by argsort, counted by histc, added to the tokens where they came from."""

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        experts, order = ids.flatten().sort(stable=True)
        ends = torch.histc(ids.flatten().float(), EXPERTS, 0, EXPERTS).cumsum(0, dtype=torch.int32)
        y = self.experts(x.index_select(0, order // CHOICES), experts, ends) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // CHOICES, y)


class Gathered(Layer):
    """One matrix for each row."""

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        hidden = torch.einsum("tkoi,ti->tko", self.up[ids], x) + self.bias[ids]
        y = F.silu(hidden).flatten(0, 1).unsqueeze(1) @ self.down[ids.flatten()]
        return (y.squeeze(1).unflatten(0, (-1, CHOICES)) * weights.unsqueeze(-1)).sum(1)


class Scattered(Sorted):
    """Put back by ``out[order] = rows``, with rows of one expert each."""

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        experts, order = ids[:, 0].sort()
        ends = torch.histc(experts.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        out = torch.empty_like(x)
        out[order] = self.experts(x[order], experts, ends)
        return out * weights[:, :1]


FORMS = (Sorted, Added, Gathered, Scattered)


def _batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)}


def _recognised(model: nn.Module, batch: dict[str, Tensor]) -> Program:
    return split_program(model, Mesh(), Plan(), (), batch, after="recognise_experts")


def _counts(program: Program) -> Counter[str]:
    return Counter(operator_name(node.target) for node in program.graph.nodes if node.op == "call_function")


def _model(form: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return form()


@pytest.mark.parametrize("form", FORMS)
def test_forms_become_expert_linear(form: type[nn.Module]) -> None:
    model, batch = _model(form), _batch()
    program = _recognised(model, batch)
    counts = _counts(program)
    calls = [node for node in program.graph.nodes if node.target is EXPERT_LINEAR]
    assert len(calls) == 2 and calls[0].args[2] is calls[1].args[2] and not SORTING & set(counts), counts
    assert not {"aten.repeat_interleave.self_int", "aten.bmm", "aten.matmul"} & set(counts), counts
    (found,) = run_graph(program.graph, input_tensors(program, model, (), batch))
    torch.testing.assert_close(found, model(**batch))


@pytest.mark.parametrize("form, mesh", one_each(FORMS, ["dp=2", "dp=3,tp=2", "tp=4"]))
def test_forms_are_exact_on_any_mesh(form: type[nn.Module], mesh: str) -> None:
    report = check(_model(form), _batch(torch.float64), Mesh.parse(mesh), Plan(bucket_mb=0))
    assert report.worst <= TOLERANCE and report.grads
    if mesh == "dp=2":
        grads = len(report.program.required_role.grads)
        assert _moved(report.program) == {("forward", "dp", "all_reduce"): 1, ("backward", "dp", "all_reduce"): grads}
    if mesh == "tp=4":
        assert held(report.program).split["tp"] >= 0.9 * held(report.program).whole


def _moved(program: Program) -> dict[tuple[str, str, str], int]:
    return {(t.phase, t.axis, t.name): t.operations for t in sent(program)}


# ---------------------------------------------------------------- what is left alone


class Positional(Sorted):
    """A row's place among the sorted ones counts."""

    def experts(self, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        return super().experts(rows, experts, ends) * torch.arange(len(rows))[:, None]


class Running(Sorted):
    """A row depends on those before it."""

    def experts(self, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        return super().experts(rows, experts, ends).cumsum(0)


class Leaking(Sorted):
    """Sorted rows are used elsewhere too."""

    def experts(self, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        return super().experts(rows, experts, ends) + rows[0]


class Descending(Sorted):
    """Groups by the last rows first: the ends are not those of the sorted ids."""

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        experts, order = ids[:, 0].sort(descending=True)
        ends = F.one_hot(experts, EXPERTS).sum(0).cumsum(0).to(torch.int32)
        return self.experts(x[order], experts, ends)[order.argsort()]


class Fixed(Sorted):
    """Groups of equal size, whatever the router says; the last rows belong to none."""

    def mixed(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        ends = (torch.arange(EXPERTS, device=x.device) + 1 + ids[0, 0] * 0).to(torch.int32) * 2
        hidden = F.grouped_mm(x, self.up.transpose(1, 2), offs=ends)[: 2 * EXPERTS]
        return F.silu(hidden).sum()


@pytest.mark.parametrize("form", [Positional, Running, Leaking, Descending, Fixed])
def test_where_order_counts_it_is_kept(form: type[nn.Module]) -> None:
    """Products are ours all the same, and exact, but rows stay where the model puts them."""
    model, batch = _model(form), _batch()
    program = _recognised(model, batch)
    counts = _counts(program)
    assert counts["autopar.expert_linear"] and not counts["aten._grouped_mm"]
    assert counts["aten.sort"] == (form is not Fixed)
    (found,) = run_graph(program.graph, input_tensors(program, model, (), batch))
    torch.testing.assert_close(found, model(**batch))
    assert check(model, batch, Mesh(dp=2, tp=2)).worst <= TOLERANCE


class Picked(nn.Module):
    """An ordinary product with gathered rows of an activation: no weights, no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        held = self.keys(x).unflatten(1, (3, 2))
        return (held[ids] @ held[ids].transpose(1, 2)).sum()


def test_gathered_activations_are_no_experts() -> None:
    counts = _counts(_recognised(Picked(), _batch() | {"ids": torch.arange(TOKENS) // 2}))
    assert not counts["autopar.expert_linear"] and counts["aten.index.Tensor"]


# ---------------------------------------------------------------- the reference in float64


def test_grouped_products_in_float64() -> None:
    torch.manual_seed(0)
    rows = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(3, 8, 8, requires_grad=True)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    wanted = F.grouped_mm(rows, weight, offs=ends)
    wide = [x.detach().double().requires_grad_() for x in (rows, weight)]
    with promote_float32():
        found = F.grouped_mm(*wide, offs=ends)
        some = F.grouped_mm(*wide, offs=torch.tensor([4, 4, 7], dtype=torch.int32))
    torch.testing.assert_close(found.float(), wanted)
    assert not some[7:].any() and torch.equal(some[:7], found[:7])
    cotangent = torch.randn_like(wanted)
    ours = torch.autograd.grad(found, wide, cotangent.double())
    for grad, expected in zip(ours, torch.autograd.grad(wanted, (rows, weight), cotangent)):
        torch.testing.assert_close(grad.float(), expected)


# ---------------------------------------------------------------- Hugging Face


def _mixtral(mesh: str, plan: Plan | None = None, **config: Any) -> Report:
    pytest.importorskip("transformers")
    implementation = config.pop("experts_implementation", None)
    example = named_model("hf:mixtral", {"num_hidden_layers": 1, **config}, batch=4, length=8)
    if implementation:
        example.model.set_experts_implementation(implementation)  # type: ignore[operator]
    return check(example.model, example.batch, Mesh.parse(mesh), plan)


@pytest.mark.parametrize("implementation", slow_but([0], ["grouped_mm", "batched_mm"]))
def test_mixtral_as_it_comes(implementation: str) -> None:
    """Data parallelism sends gradients and the loss with its count, nothing else; tensor parallelism splits experts."""
    plan = Plan(bucket_mb=0)
    report = _mixtral("dp=2", plan, experts_implementation=implementation)
    assert report.passed, report.worst
    grads = len(report.program.required_role.grads)
    assert _moved(report.program) == {("forward", "dp", "all_reduce"): 2, ("backward", "dp", "all_reduce"): grads}
    split = _mixtral("tp=2", plan, experts_implementation=implementation)
    assert split.passed, split.worst
    per_layer = re.findall(r"param (\S*experts\S*) +: f64(\[.*\])", str(split.program).partition("forward:")[0])
    assert dict(per_layer) == {
        "model.layers.0.mlp.experts.gate_up_proj": "[12,(2 96@tp),192]",
        "model.layers.0.mlp.experts.down_proj": "[12,192,96@tp]",
    }


def test_the_balance_of_experts_is_that_of_the_whole_batch() -> None:
    """The auxiliary loss is a product of two means over all tokens: no mean of the ranks' products."""
    report = _mixtral("dp=2,tp=2", output_router_logits=True, router_aux_loss_coef=0.5)
    assert report.passed, report.worst
    alone = _mixtral("dp=1", output_router_logits=True, router_aux_loss_coef=0.5)
    without = _mixtral("dp=1", output_router_logits=True, router_aux_loss_coef=0.0)
    assert report.step.loss is not None and alone.step.loss is not None and without.step.loss is not None
    assert abs(float(alone.step.loss - without.step.loss)) > 0.1


def test_what_the_experts_give_is_summed_for_each_token_before_it_is_sent() -> None:
    """A pending sum over tp passes the routing weights, the sum over a token's experts and the cast to bfloat16."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 4096, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=8, num_key_value_heads=8, use_cache=False)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros(4, 512, dtype=torch.int64)
    program = split_program(model, Mesh(tp=2), Plan(), (), {"input_ids": ids, "labels": ids})
    reduced = re.findall(r"comm\.all_reduce\(\w+, tp\)\s+: (bf16\S+)", str(program))
    assert reduced == ["bf16[4,512,1024]", "bf16[4,512,1024]", "bf16[2048,1024]"]  # tokens, attention, experts
