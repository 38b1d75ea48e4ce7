"""Families of small programs: members are what the compiler makes, text for text; what is none is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.compiler import compile_program
from autopar.families.family import Family, Point, fit
from autopar.families.forms import NoForm
from autopar.families.walk import LAZY, numbers_of
from autopar.ir.program import AnyProgram, Program
from autopar.mesh import Mesh
from autopar.models import gpt, llama, moe
from autopar.plan import Plan
from tests.selection import slow_but

POINTS = ((8, 28), (8, 40), (16, 12), (24, 60))  # two rows or more on each rank: one row has a program of its own
OTHERS = ((8, 12), (16, 44), (24, 36))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama.Llama(llama.Config(vocab=64, context=64, width=16, layers=2, heads=4, kv_heads=2, ff=32)),
    "gpt": lambda: gpt.GPT(gpt.Config(vocab=64, context=64, width=16, layers=2, heads=4)),
    "mixture": lambda: moe.Mixtral(
        moe.Config(vocab=64, context=64, width=16, layers=2, heads=4, kv_heads=2, ff=16, experts=4, top_k=2)
    ),
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "dp=1", {}),
    ("llama", "dp=2,tp=2", {"zero": 3}),
    ("llama", "tp=2", {"sequence": "megatron"}),
    ("llama", "sp=2", {}),
    ("llama", "pp=2", {"microbatches": 2}),
    ("gpt", "dp=4", {"zero": 2}),
    ("gpt", "sp=2", {"attention": "ulysses"}),
    ("gpt", "dp=2,pp=2", {"microbatches": 2, "recompute": "full"}),
    ("mixture", "ep=2", {}),
    ("mixture", "dp=2,ep=2,tp=2", {"zero": 1}),
]


def compiled(
    model: nn.Module, mesh: str, plan: dict[str, Any], like: AnyProgram | None = None, *, b: int, s: int
) -> Any:
    batch = {"input_ids": torch.zeros(b, s, dtype=torch.int64), "labels": torch.zeros(b, s, dtype=torch.int64)}
    return compile_program(model, Mesh.parse(mesh), Plan(check_numerics=False, **plan), (), batch, like=like)


def family_of(model: nn.Module, mesh: str, plan: dict[str, Any], points: Any = POINTS) -> Family:
    first = compiled(model, mesh, plan, b=points[0][0], s=points[0][1])
    rest = [Point({"b": b, "s": s}, compiled(model, mesh, plan, first, b=b, s=s)) for b, s in points[1:]]
    return fit([Point({"b": points[0][0], "s": points[0][1]}, first), *rest])


@pytest.mark.parametrize(("name", "mesh", "plan"), slow_but((1,), CASES))
def test_members_are_what_the_compiler_makes(name: str, mesh: str, plan: dict[str, Any]) -> None:
    model = MODELS[name]()
    family = family_of(model, mesh, plan)
    for b, s in OTHERS:
        made, expected = family.member({"b": b, "s": s}), compiled(model, mesh, plan, family.template, b=b, s=s)
        assert str(made) == str(expected)
        assert numbers_of(made) == numbers_of(expected)


class Net(nn.Module):
    """What it does to x (b, s) depends on ``act``."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(1)), act

    def forward(self, x: Tensor) -> Tensor:
        return (self.act(x) * self.weight).square().mean()


def net_program(act: Callable[[Tensor], Tensor], b: int, s: int) -> AnyProgram:
    return compile_program(Net(act), Mesh(dp=2), Plan(check_numerics=False), (torch.ones(b, s),))


def halves(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


def longer_than_twenty(x: Tensor) -> Tensor:
    return x.tanh() if x.shape[1] > 20 else x


def squares(x: Tensor) -> Tensor:
    return x.new_ones(x.shape[1] ** 2).sum() * x


def backwards(x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[1], 0, -1)


def of_its_length(x: Tensor) -> Tensor:
    return x / x.shape[1]


def points_of(act: Callable[[Tensor], Tensor]) -> list[Point]:
    return [Point({"b": b, "s": s}, net_program(act, b, s)) for b, s in POINTS]


@pytest.mark.parametrize("act", [longer_than_twenty, squares, backwards])
def test_no_family(act: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NoForm):
        fit(points_of(act))


@pytest.mark.parametrize("act", [halves, of_its_length])
def test_numbers_of_lengths(act: Callable[[Tensor], Tensor]) -> None:
    family = fit(points_of(act))
    assert str(family.member({"b": 8, "s": 44})) == str(net_program(act, 8, 44))


def test_sizes_that_give_no_whole_numbers_are_outside() -> None:
    family = fit(points_of(halves))
    assert {"b": 8, "s": 44} in family
    assert {"b": 8, "s": 45} not in family and {"b": 8, "s": 64} not in family and {"b": 5, "s": 44} not in family
    assert {"s": 44} not in family


def test_a_family_grows_by_a_program_that_it_foretold() -> None:
    family = fit(points_of(halves))
    outside = {"b": 4, "s": 100}
    assert outside not in family
    larger = family.extended(net_program(halves, 4, 100), outside)
    assert larger is not None and outside in larger and {"b": 4, "s": 80} in larger
    assert family.extended(net_program(longer_than_twenty, 4, 100), outside) is None
    assert family.extended(net_program(halves, 4, 96), outside) is None


def test_graphs_are_made_when_they_are_asked_for() -> None:
    made = fit(points_of(halves)).member({"b": 8, "s": 44})
    assert isinstance(made, Program) and not set(LAZY) & made.__dict__.keys()
    assert made.role is not None and "role" in made.__dict__


def test_the_template_says_sizes() -> None:
    assert "f32[b@dp,s]" in str(fit(points_of(torch.tanh)).template)
