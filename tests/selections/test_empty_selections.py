"""Models that ask whether a condition selected any row: one graph for both answers, or a refusal with the line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.check import Reference
from autopar.errors import TraceError
from autopar.frontend.trace import trace
from autopar.mesh import Mesh
from autopar.plan import Plan
from tests.loops_over_experts import EXPERTS, WIDTH, Mixture
from tests.passes.test_stack_experts import products, program, rows
from tests.selection import slow_but


class Skips(Mixture):
    """As Mixtral's first form: experts that nobody chose are skipped."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        scores = self.gate(flat)
        scores = scores - 50.0 * torch.tensor([0.0] * (EXPERTS - 1) + [1.0]) * self.unused
        weights, chosen = torch.topk(scores.softmax(-1), self.choices)
        mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            place, token = torch.where(mask[number])
            if token.shape[0] == 0:
                continue
            out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
        return out.square().mean()


class AddsOtherwise(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            (token,) = torch.where(self.gate(flat)[:, number] > 0)
            if token.numel() == 0:
                out = out + 1.0
            else:
                out = out.index_add(0, token, expert(flat[token]))
        return out.square().mean()


class CountsExperts(Mixture):
    """What it adds for each expert that has rows depends on none of them."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        used = 0.0
        for number, expert in enumerate(self.experts):
            (token,) = torch.where(self.gate(flat)[:, number] > 0)
            if len(flat[token].shape) and token.numel() > 0:
                used += 1.0
                flat = flat.index_add(0, token, expert(flat[token]))
        return flat.square().mean() * used


class EndsAtTheFirst(Mixture):
    """Experts after one that nobody chose are not asked."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        out, chosen = torch.zeros_like(flat), self.gate(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            (token,) = torch.where(chosen == number)
            if token.shape[0] == 0:
                break
            out = out.index_add(0, token, expert(flat[token]))
        return out.square().mean()


class HitExperts(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        out = torch.zeros_like(flat)
        for number in (self.gate(flat)[:, :EXPERTS] > 0).any(0).nonzero():
            out = out + self.experts[number](flat)
        return out.square().mean()


@pytest.mark.parametrize("unused", slow_but([1], [False, True]), ids=["all_used", "one_unused"])
def test_one_graph_serves_both(unused: bool, capfd: pytest.CaptureFixture[str]) -> None:
    model = Skips(unused=unused)
    assert len(products(program(model))) == 2
    assert "def forward" not in capfd.readouterr().err  # torch prints what it had of the graph when it gave up
    reference = Reference(model, rows())
    for mesh in ("dp=1", "dp=2,tp=2"):
        assert reference.check(Mesh.parse(mesh), Plan(zero=3)).worst <= 1e-12


@pytest.mark.parametrize(
    ("kind", "problem", "line"),
    [
        (AddsOtherwise, "where a condition selects no row", "if token.numel() == 0:"),
        (CountsExperts, "where a condition selects no row", "token.numel() > 0:"),
        (EndsAtTheFirst, "where a condition selects no row", "if token.shape[0] == 0:"),
        (HitExperts, "where a condition selects no row", "for number in (self.gate(flat)[:, :EXPERTS] > 0)"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_what_does_more_is_refused(kind: type[Mixture], problem: str, line: str) -> None:
    with pytest.raises(TraceError) as info:
        trace(kind(), (), rows())
    text = str(info.value)
    assert problem in text and line in text and "Way out: " in text and text.count("\n") < 15
