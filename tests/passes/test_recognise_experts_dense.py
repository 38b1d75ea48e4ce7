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

TOKENS, CHOICES, EXPERTS, WIDTH, INNER = 12, 2, 4, 8, 16


class Layer(nn.Module):
    """A router and gated experts, some with biases; ``mixed`` is what the spellings below differ in."""

    choices = CHOICES

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.gate = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 4)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER))
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        probabilities = logits.softmax(-1)
        top, ids = probabilities.topk(self.choices, -1)
        scattered = torch.zeros_like(probabilities).scatter(-1, ids, top / top.sum(-1, keepdim=True))
        balance = ((scattered > 0).to(x.dtype).mean(0) * probabilities.mean(0)).sum()  # of all tokens and experts
        return self.mixed(x, logits, top, ids, scattered).square().mean() + 0.1 * balance.sum()

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        raise NotImplementedError

    def experts(self, x: Tensor) -> Tensor:
        """(N, C) -> (E, N, C)"""
        hidden = F.silu(torch.einsum("nc,ecf->enf", x, self.gate)) * torch.einsum("nc,ecf->enf", x, self.up)
        return torch.einsum("enf,efc->enc", hidden, self.down)


class Einsum(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("ne,enc->nc", scattered, self.experts(x))


class Expanded(Layer):
    """gpt_oss as its authors wrote it: tokens repeated for each expert, batched products, biases, columns in pairs."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        rows = x.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)
        both = torch.baddbmm(self.up_bias.repeat(1, 2)[:, None, :], rows, torch.cat([self.gate, self.up], -1))
        gate, up = both[..., ::2], both[..., 1::2]
        y = torch.bmm((up.clamp(-1, 1) + 1) * gate * torch.sigmoid(gate), self.down) + self.down_bias[:, None]
        return (y * scattered.transpose(0, 1)[..., None]).sum(0)


class OneHot(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        weights = (F.one_hot(ids, EXPERTS) * top[..., None]).sum(1)
        return (weights.t()[..., None] * self.experts(x)).sum(0)


class OneHotEinsum(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        return torch.einsum("nke,enc,nk->nc", F.one_hot(ids, EXPERTS).to(x.dtype), self.experts(x), top)


class Selected(Layer):
    """The result of each choice by itself, weighted later."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        chosen = torch.einsum("nke,enc->nkc", F.one_hot(ids, EXPERTS).to(x.dtype), self.experts(x))
        return (chosen * top[..., None]).sum(1)


class Compared(Layer):
    """Ids compared with all numbers, ``matmul`` with an implied dim, biases, a norm over the width in an expert."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        weights = ((ids[..., None] == torch.arange(EXPERTS)) * top[..., None]).sum(1)
        hidden = F.layer_norm(F.gelu(x @ self.up + self.up_bias[:, None]), (INNER,))
        return (weights[:, None, :] @ (hidden @ self.down).transpose(0, 1)).squeeze(1)


class Hidden(Layer):
    """The others at -inf, then a softmax over all experts."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        kept, chosen = logits.topk(CHOICES, -1)
        weights = torch.full_like(logits, float("-inf")).scatter(-1, chosen, kept).softmax(-1)
        return torch.einsum("ne,enc->nc", weights, self.experts(x))


class Masked(Layer):
    """Probabilities times a mask, and normalised over what remains."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        kept = logits.softmax(-1) * torch.zeros_like(logits).scatter(1, ids, 1.0)
        weights = kept / kept.sum(-1, keepdim=True)
        hidden = torch.einsum("nc,ecf->nef", x, self.up).relu()
        return (torch.einsum("nef,efc->nec", hidden, self.down) * weights[..., None]).sum(1)


class Filled(Layer):
    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        mask = (ids[..., None] == torch.arange(EXPERTS)).any(1)
        weights = logits.sigmoid().masked_fill(~mask, 0.0)
        return torch.einsum("ne,enc->nc", torch.where(mask, weights, 0.0), self.experts(x))


class Scored(Layer):
    """llama4: the score multiplies what an expert takes, and its experts map 0 to 0."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        kept, chosen = torch.topk(logits, self.choices, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, kept).sigmoid()
        rows = (x.repeat(EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(EXPERTS, -1, WIDTH)
        gate, up = torch.bmm(rows, torch.cat([self.gate, self.up], -1)).chunk(2, dim=-1)
        y = torch.bmm(up * F.silu(gate), self.down).view(-1, WIDTH)
        return x + y.reshape(EXPERTS, -1, WIDTH).sum(dim=0)


class Joined(Layer):
    """One product sums over experts and over their inner width."""

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        hidden = torch.einsum("nc,ecf->nef", x, self.up).relu() * scattered[..., None]
        return hidden.reshape(-1, EXPERTS * INNER) @ self.down.reshape(EXPERTS * INNER, WIDTH)


class Batched(Layer):
    """Tokens in two dims, and one product of three tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(0, (-1, 2)))

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        hidden = torch.einsum("btc,ecf->btef", x, self.up).tanh()
        return torch.einsum("btef,efc,bte->btc", hidden, self.down, scattered)


class Switch(Layer):
    """One expert for each token, by argmax."""

    choices = 1

    def mixed(self, x: Tensor, logits: Tensor, top: Tensor, ids: Tensor, scattered: Tensor) -> Tensor:
        gates = logits.softmax(-1) * F.one_hot(logits.argmax(-1), EXPERTS)
        return torch.einsum("ne,enc->nc", gates, self.experts(x))


class OneOf(Scored):
    choices = 1


FORMS = (
    Einsum, Expanded, OneHot, OneHotEinsum, Selected, Compared, Hidden, Masked, Filled, Scored, Joined, Batched, Switch,
    OneOf,
)  # fmt: skip


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


@pytest.mark.parametrize("form", FORMS)
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


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_exact_on_any_mesh(form: type[nn.Module]) -> None:
    reference = Reference(_model(form), _batch())
    assert reference.grads["router.weight"] is not None and reference.grads["router.weight"].abs().max() > 1e-6
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
    Some: "it takes some of the experts",
    Weighted: "it is none of the forms that are known",
    Shifted: "what an expert gives for a token that did not choose it is not 0",
    Given: "it is none of the forms that are known",
}


@pytest.mark.parametrize("form", LEFT)
def test_what_is_no_sum_over_choices_is_left(form: type[nn.Module]) -> None:
    model, batch = _model(form), _batch()
    program = _recognised(model, batch)
    assert not routed_regions(program) and not _products(program)["autopar.expert_linear"]
    (left,) = unrecognised(program)
    assert LEFT[form] in left.reason and "test_recognise_experts_dense.py" in left.source, left
    (found,) = run_graph(program.graph, input_tensors(program, model, (), batch))
    assert torch.equal(found, model(**batch))
    assert Reference(model, batch).check(Mesh(dp=2, tp=2)).worst <= TOLERANCE


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("choices", [1, 2, 3])
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
