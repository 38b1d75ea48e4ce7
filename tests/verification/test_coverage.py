"""The coverage report: what passes, and that nothing which is gathered, replicated or refused does."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from autopar.__main__ import app
from autopar.commands.coverage import measure
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.verification.coverage import CASES, Case, Coverage, cover
from tests.selection import slow_but

DATA, TENSOR, EXPERTS = Case("dp=2", Mesh(dp=2)), Case("tp=2", Mesh(tp=2)), Case("ep=2", Mesh(ep=2))


class Toy(nn.Module):
    """Two linears and a loss; ``body`` comes in between."""

    def __init__(self, width: int = 64, body: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.body, self.down = nn.Linear(8, width), body or nn.Identity(), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.body(self.up(x)).relu()).square().sum()


def covered(model: nn.Module, *cases: Case) -> Coverage:
    return cover("toy", "plain torch", model, {"x": torch.randn(4, 8)}, cases)


def test_what_is_split_passes() -> None:
    data, tensor = covered(Toy(), DATA, TENSOR).outcomes
    assert data.passed and data.compute["dp"] > 0.999 and data.efficiency > 0.9
    assert tensor.passed and tensor.parameters["tp"] > 0.9 and tensor.compute["tp"] > 0.8


class MixesRows(nn.Module):
    """Every row needs every other."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.T).softmax(-1) @ x


def test_what_gathers_the_batch_is_exact_but_does_not_pass() -> None:
    (data,) = covered(Toy(body=MixesRows()), DATA).outcomes
    assert data.exact and not data.passed
    assert any("all_gather over dp: body" in remark for remark in data.remarks), data.remarks


def test_batch_norm_is_named() -> None:
    body = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(64))  # without the relu, the bias before has no gradient but noise
    (data,) = covered(Toy(body=body), DATA).outcomes
    assert data.exact and not data.passed
    assert data.remarks[0].startswith("statistics of batch normalisation reduced over dp"), data.remarks


def test_a_model_that_stays_whole_is_exact_but_does_not_pass() -> None:
    case = Case("whole", Mesh(tp=2), Plan(tensor={"*": "replicate"}))
    (tensor,) = covered(Toy(), case).outcomes
    assert tensor.exact and not tensor.passed and tensor.parameters == {"tp": 0.0}
    assert "up.weight (4" in tensor.remarks[0], tensor.remarks


class Mixture(nn.Module):
    """Each row goes to one of four experts; ``keep``: all ranks need the weights of all of them, beside that."""

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.router, self.experts, self.keep = nn.Linear(64, 4), nn.Parameter(torch.randn(4, 64, 64) / 8), keep

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        found = torch.bmm(self.experts[chosen], x.unsqueeze(-1)).squeeze(-1) * weight.unsqueeze(-1)
        return found + self.experts.square().sum() if self.keep else found


def test_experts_that_are_dealt_out_pass() -> None:
    ours, folded = covered(Toy(body=Mixture()), EXPERTS, Case("ep=2,tp=2", Mesh(ep=2, tp=2))).outcomes
    assert ours.passed and ours.compute["ep"] > 0.999 and 0.9 < ours.parameters["ep"] < 1.0
    assert folded.passed and folded.parameters["ep"] == ours.parameters["ep"] and folded.parameters["tp"] > 0.9


def test_a_layer_whose_experts_are_all_on_each_rank_does_not_pass() -> None:
    body = nn.Sequential(Mixture(), Mixture(keep=True))
    with pytest.warns(UserWarning, match="the experts of body.1 stay whole on ep"):
        (found,) = covered(Toy(body=body), EXPERTS).outcomes
    assert found.exact and not found.passed and found.parameters["ep"] < 0.5
    assert found.remarks == ("all experts on each rank of ep: body.1",)


class Averaged(nn.Module):
    """The mean of all experts, though each row chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(64, 4), nn.Parameter(torch.randn(4, 64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.router(x).topk(1)
        weights = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, chosen, scores)
        return (torch.einsum("nc,ecf->nef", x, self.experts) * weights.unsqueeze(-1)).mean(1)


def test_a_layer_in_which_no_experts_were_recognised_does_not_pass() -> None:
    (found,) = covered(Toy(body=nn.Sequential(Mixture(), Averaged())), EXPERTS).outcomes
    assert found.exact and not found.passed
    (remark,) = found.remarks
    assert remark.startswith("all experts on each rank of ep: body.1, since it takes the mean of the experts")


def test_what_gathers_the_batch_does_not_pass_on_ep_either() -> None:
    (found,) = covered(Toy(body=nn.Sequential(Mixture(), MixesRows())), EXPERTS).outcomes
    assert found.exact and not found.passed
    assert any("all_gather over ep: body.1" in remark for remark in found.remarks), found.remarks
    assert not any("rows" in remark for remark in found.remarks), found.remarks


def test_what_a_model_does_not_have_is_told_from_what_is_refused() -> None:
    sequence = Case("sp=2", Mesh(sp=2))
    absent = [outcome.absent for outcome in covered(Toy(), DATA, sequence, EXPERTS).outcomes]
    assert absent == ["", "sequence", "experts"]
    (kept,) = covered(Toy(body=Mixture(keep=True)), EXPERTS).outcomes
    assert not kept.absent and not kept.exact and "outside of the experts" in kept.failure


def test_what_is_refused_says_why_and_what_the_way_out_gives() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.reshape(4, 1, 3, 4, 2).permute(2, 0, 3, 1, 4)[:, :, :3].unbind(0)
            return nn.functional.scaled_dot_product_attention(q, k, v).reshape(4, 6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.inner, self.out = nn.Linear(8, 24), Attention(), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(self.qkv(x))).square().sum()

    (tensor,) = covered(Model(), TENSOR).outcomes
    assert tensor.failure and not tensor.passed
    assert tensor.exact, "with on_indivisible='replicate'"


def test_wrong_numbers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from autopar import simulate

    plain = simulate._gradients
    monkeypatch.setattr(simulate, "_gradients", lambda *given: {name: 2 * grad for name, grad in plain(*given).items()})
    (data,) = covered(Toy(), DATA).outcomes
    assert data.error is not None and data.error > 0.5 and not data.exact and not data.passed


def test_a_model_that_cannot_be_traced() -> None:
    class Branching(Toy):
        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return y.sum() if y.sum() > 0 else y.mean()

    found = covered(Branching(), DATA)
    assert "cannot be traced" in found.failure and not found.outcomes


@pytest.mark.parametrize("name", slow_but([0], ["llama", "mixtral", "segformer", "clip"]))
def test_architectures(name: str) -> None:
    pytest.importorskip("transformers")
    found = measure(name, "any", CASES)
    assert not found.failure and not found.unknown
    by_title = {outcome.title: outcome for outcome in found.outcomes}
    sequence, experts = by_title.pop("sp=2"), by_title.pop("ep=2")
    assert experts.passed if name == "mixtral" else experts.absent == "experts"
    assert all(outcome.exact for outcome in by_title.values()), found
    if name == "llama":
        assert (
            all(outcome.passed for outcome in by_title.values()) and sequence.passed and sequence.compute["sp"] > 0.999
        )
    if name == "segformer":
        assert by_title["dp=2"].passed and "1 heads" in by_title["tp=2"].failure
        assert sequence.exact
    if name == "clip":
        assert by_title["tp=2"].passed and "all_gather" in by_title["dp=2"].remarks[0]
        assert "17 positions" in sequence.failure


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["coverage", *words])


def test_the_command(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    page = tmp_path / "page.md"
    found = run(
        "gpt2", "models.mlp", "--mesh", "dp=2", "--mesh", "tp=2", "--jobs", "1", "--json", "--markdown", str(page)
    )
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)["architectures"]
    assert [row["name"] for row in rows] == ["gpt2", "models.mlp"]
    assert all(outcome["passed"] for row in rows for outcome in row["outcomes"])
    assert re.search(r"\| gpt2 \|.*\| pass \| pass \|", page.read_text())


@pytest.mark.slow
def test_the_command_says_what_a_model_does_not_have(tmp_path: Any) -> None:
    page = tmp_path / "page.md"
    meshes = ("--mesh", "ep=2", "--mesh", "ep=3", "--mesh", "sp=2")
    found = run("models.moe", "models.mlp", *meshes, "--jobs", "1", "--json", "--markdown", str(page))
    assert found.exit_code == 0, found.output
    moe, mlp = json.loads(found.stdout)["architectures"]
    assert all(outcome["passed"] for outcome in moe["outcomes"]), "a batch that two and three ranks divide"
    assert [outcome["absent"] for outcome in mlp["outcomes"]] == ["experts", "experts", "sequence"]
    text = page.read_text()
    assert "| pass | pass | pass |" in text and "| no experts | no experts | no sequence |" in text
    assert "ep=3: 1 pass, 1 exact, 1 without experts; sp=2: 1 pass, 1 exact, 1 without sequence" in text
    assert "(1)" not in text, "what is said in the table needs no note"


def test_names_that_it_does_not_know() -> None:
    found = run("lama")
    assert isinstance(found.exception, ValueError) and "coverage knows no 'lama'" in str(found.exception)
