"""Experts that run for every token: spellings of which only the chosen pairs are computed, and what is left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.analysis.experts import routed_regions, unrecognised
from autopar.check import TOLERANCE, Reference
from autopar.compiler import split_program
from autopar.experts.dense import FORM
from autopar.frontend.numerics import input_tensors, run_graph
from autopar.ir.node import value
from autopar.ir.operator_facts import is_product
from autopar.ir.program import Program
from autopar.ir.text import operator_name
from autopar.mesh import Mesh
from autopar.operators.experts import EXPERT_LINEAR
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.passes.dense_experts import EXPERTS, FORMS, TOKENS, WIDTH, Layer, Listed
from tests.selection import slow_but


def _model(form: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return form()


def _batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"x": torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)}


def _recognised(model: nn.Module, batch: dict[str, Tensor]) -> Program:
    program = split_program(model, Mesh(), Plan(), (), batch, after="recognise_experts")
    assert isinstance(program, Program)
    return program


def _products(program: Program) -> Counter[str]:
    return Counter(operator_name(node.target) for node in program.graph.nodes if is_product(node.target))


@pytest.mark.parametrize("form", slow_but(range(1, len(FORMS), 2), FORMS))
def test_only_chosen_pairs_are_computed(form: type[Layer]) -> None:
    model, batch = _model(form), _batch(torch.float64)
    program = _recognised(model.double(), batch)
    (region,) = routed_regions(program)
    assert (region.experts, region.choices, region.chosen) == (EXPERTS, form.choices, FORM)
    assert not unrecognised(program)
    assert set(_products(program)) == {"autopar.expert_linear", "aten.linear"}, program  # experts and the router
    calls = [node for node in program.graph.nodes if node.target is EXPERT_LINEAR]
    assert [node.name for node in calls] == list(region.products)
    assert {value(node).shape[0] for node in calls} == {TOKENS * form.choices} and len({n.args[2] for n in calls}) == 1
    (found,) = run_graph(program.graph, input_tensors(program, model, (), batch))
    torch.testing.assert_close(found, model(**batch), rtol=1e-14, atol=0)


MESHES = {"dp=1": Plan(), "dp=2": Plan(), "tp=2": Plan(), "dp=3": Plan(zero=3)}


@pytest.mark.parametrize("form", slow_but(range(0, len(FORMS), 4), FORMS))
def test_forms_are_exact_on_any_mesh(form: type[nn.Module]) -> None:
    reference = Reference(_model(form), _batch())
    router = reference.whole(0).grads["router.weight"]
    assert router is not None and router.abs().max() > 1e-6
    for mesh, plan in MESHES.items():
        report = reference.check(Mesh.parse(mesh), plan)
        assert report.worst <= 1e-12 and report.grads, mesh


# ---------------------------------------------------------------- what is left alone


class Biased(Layer):
    """The score multiplies what an expert takes, and with a bias it gives something for 0."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        rows = torch.einsum("nc,ne->enc", x, scattered)
        hidden = torch.relu(torch.bmm(rows, self.up) + self.up_bias[:, None])
        return torch.bmm(hidden, self.down).sum(0)


class Cosine(Layer):
    """cos(0) is 1."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        rows = torch.einsum("nc,ne->enc", x, scattered)
        return torch.bmm(torch.bmm(rows, self.up).cos(), self.down).sum(0)


class Averaged(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return (self.experts(x) * scattered.t()[..., None]).mean(0)


class AcrossTokens(Layer):
    """What an expert gives for one token depends on the others."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("ne,enc->nc", scattered, self.experts(x).softmax(1))


class AcrossExperts(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("ne,enc->nc", scattered, self.experts(x).softmax(0))


class Some(Layer):
    """A sum over the first experts alone."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("ne,enc->nc", scattered[:, :3], self.experts(x)[:3])


class Weighted(Layer):
    """The other experts have a weight too."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("ne,enc->nc", logits.scatter(1, ids, top), self.experts(x))


class Shifted(Layer):
    """The weights of the choices are 1 more than 0 for every expert."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("ne,enc->nc", scattered + 1, self.experts(x))


class Unequal(Listed):
    """The experts are of two kinds."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        results = [F.relu(F.linear(x, up.t())) @ down for up, down in zip(self.up[:3], self.down[:3])]
        results.append(F.silu(F.linear(x, self.up[3].t())) @ self.down[3])
        return sum((scattered[:, i, None] * result for i, result in enumerate(results)), x)


class Swapped(Layer):
    """Two experts have the weights of each other."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        order = (1, 0, 2, 3)
        return sum(scattered[:, i, None] * (x @ self.up[order[i]]).relu() @ self.down[i] for i in range(EXPERTS))


class Ensemble(Layer):
    """All experts with a weight for each: their loop stays a loop."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        gates = logits.softmax(-1)
        return sum(gates[:, i, None] * ((x @ self.up[i]).relu() @ self.down[i]) for i in range(EXPERTS))


class Given(Layer):
    """Ids that are no choice: a token may have the same expert twice, and of scattered weights one is kept."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        twice = (ids // 2) * 2
        return torch.einsum("ne,enc->nc", torch.zeros_like(logits).scatter(1, twice, 1.0), self.experts(x))


LEFT = {
    Biased: "what an expert gives for a token that did not choose it is not 0",
    Cosine: "what an expert gives for a token that did not choose it is not 0",
    Averaged: "it takes the mean of the experts",
    AcrossTokens: "it works along the tokens",
    AcrossExperts: "a softmax over experts, of which those not chosen are not -inf",
    Some: "it takes some of the experts by themselves",
    Weighted: "it is none of the forms that are known",
    Shifted: "what an expert gives for a token that did not choose it is not 0",
    Unequal: "differs in more than their weights",
    Swapped: "differs in more than their weights",
    Ensemble: "it is none of the forms that are known",
    Given: "it is none of the forms that are known",
}


@pytest.mark.parametrize("form", slow_but([0, 2, 3, 4, 5, 6, 9], LEFT))
def test_what_is_no_sum_over_choices_is_left(form: type[nn.Module]) -> None:
    model, batch = _model(form), _batch()
    program = _recognised(model, batch)
    assert not routed_regions(program) and not _products(program)["autopar.expert_linear"]
    (left,) = unrecognised(program)
    assert LEFT[form] in left.reason and "dense_experts.py" in left.source, left
    (found,) = run_graph(program.graph, input_tensors(program, model, (), batch))
    assert torch.equal(found, model(**batch))
    assert Reference(model, batch).check(Mesh(dp=2, tp=2)).worst <= TOLERANCE


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("choices", slow_but([1], [1, 2, 3]))
def test_our_mixture_with_its_balance_loss(choices: int) -> None:
    example = named_model("moe", {"balance": 0.5, "layers": 1, "top_k": choices}, batch=4, length=6)
    reference = Reference(example.model, example.batch)
    for mesh, plan in {"dp=2": Plan(), "tp=2": Plan(), "dp=2,tp=2": Plan(zero=3)}.items():
        report = reference.check(Mesh.parse(mesh), plan)
        assert report.worst <= TOLERANCE, mesh
        (region,) = routed_regions(report.program)
        assert (region.choices, region.experts, len(region.products)) == (choices, 12, 3)


def test_llama4() -> None:
    pytest.importorskip("transformers")
    example = named_model("hf:llama4_text", {"num_hidden_layers": 1}, batch=4, length=8)
    reference = Reference(example.model, example.batch)
    for mesh, plan in {"dp=2": Plan(), "tp=2": Plan(), "dp=4": Plan(zero=3)}.items():
        report = reference.check(Mesh.parse(mesh), plan)
        assert report.worst <= TOLERANCE and len(routed_regions(report.program)) == 1, mesh
