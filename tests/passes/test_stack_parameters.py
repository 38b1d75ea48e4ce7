"""Parameters of experts as one parameter of the program: when, how they are laid out, the numbers on any mesh."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.check import Reference
from autopar.compiler import split_program
from autopar.ir.node import value
from autopar.ir.parse import parse
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.split.obstacles import parameter_names
from tests.loops_over_experts import WIDTH, Gated, Mixture, where
from tests.selection import slow_but

STACKS = ["mixture.experts.*.w1.weight", "mixture.experts.*.w3.weight", "mixture.experts.*.w2.weight"]


class Net(nn.Module):
    """``first``: an expert's matrix that is used outside, too."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.mixture, self.first = Mixture(where, Gated), first

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = self.mixture(x)
        return {"loss": loss + self.mixture.experts[0].w1.weight.square().mean() if self.first else loss}


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 3, WIDTH, generator=torch.Generator().manual_seed(1))}


def layouts(program: AnyProgram) -> dict[str, str]:
    return {entry.target: str(value(node).layout) for node, entry in program.placeholders(InputKind.PARAMETER)}


def test_one_parameter_for_all_experts_where_experts_are_spread() -> None:
    program = split_program(Net(), Mesh(ep=2), Plan(zero=3), (), batch())
    assert list(layouts(program)) == ["mixture.gate.weight", *STACKS]
    assert layouts(program)[STACKS[0]] == "[4@ep,12,8]"
    assert str(parse(str(program))) == str(program)
    assert not any(node.target is torch.ops.aten.stack.default for node in program.graph.nodes)
    assert program.explain("mixture.experts.3.w1.weight") == program.explain(STACKS[0])


def test_own_parameters_elsewhere() -> None:
    assert len(layouts(split_program(Net(), Mesh(dp=2), Plan(), (), batch()))) == 13
    other_use = layouts(split_program(Net(first=True), Mesh(ep=2), Plan(), (), batch(), after="stack_parameters"))
    assert "mixture.experts.0.w1.weight" in other_use and STACKS[2] in other_use and len(other_use) == 7


def test_a_plan_may_name_the_experts_own_parameters() -> None:
    program = split_program(Net(), Mesh(ep=2), Plan(), (), batch(), after="stack_parameters")
    assert isinstance(program, Program)
    (weight,) = (node for node, entry in program.placeholders(InputKind.PARAMETER) if entry.target == STACKS[0])
    assert parameter_names(program, weight) == [STACKS[0], *(f"mixture.experts.{i}.w1.weight" for i in range(4))]


@pytest.mark.parametrize("mesh", slow_but([1, 4], ["ep=2", "ep=3", "dp=2,ep=2", "ep=2,tp=2", "dp=2,ep=2,tp=2"]))
def test_exact_on_meshes(mesh: str) -> None:
    data = {"x": torch.randn(12, 1, WIDTH, generator=torch.Generator().manual_seed(1))}
    reference = Reference(Net(), data)
    for zero in (0, 3):
        report = reference.check(Mesh.parse(mesh), Plan(zero=zero))
        assert report.worst <= 1e-12
        assert report.grads.keys() == dict(Net().named_parameters()).keys()
        assert STACKS[0] in layouts(report.program)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixtures = nn.ModuleList(Net() for _ in range(2))
        self.between = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.mixtures:
            moe = layer.mixture
            weights, chosen = torch.topk(moe.gate(x).softmax(-1), 2)
            x = x + self.between(where(moe.experts, x, weights, chosen))
        return {"loss": x.square().mean()}


def test_stages() -> None:
    data = {"x": torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))}
    report = Reference(Layers(), data).check(Mesh(pp=2, ep=2), Plan(microbatches=2))
    assert report.worst <= 1e-12
    assert sum("*" in name for name in layouts(report.program)) == 6
