"""A family of programs is fitted once: a later launch finds it, unless one of its programs is another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.cache import kept_families
from autopar.cache.kept_families import fitted
from autopar.cache.kept_program import KeptProgram
from autopar.compiler import compile_program
from autopar.families.family import Family, Point
from autopar.families.forms import NoForm
from autopar.families.sizes import Scheme
from autopar.ir.program import AnyProgram
from autopar.models import gpt
from tests.cache.launches import some_of

LENGTHS = (8, 12, 20)


class Net(nn.Module):
    def __init__(self, scale: float | None = 2.0, act: Callable[[Tensor], Tensor] = Tensor.relu) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(4, 4), act
        self.table = None if scale is None else torch.full((32, 1), scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x if self.table is None else x * self.table[: x.shape[1]])
        return (self.act(y) if x.shape[1] == 12 else y.relu()).square().mean()


def net(mesh: Mesh, plan: Plan, **choices: Any) -> list[AnyProgram]:
    return [compile_program(Net(**choices), mesh, plan, (), {"x": torch.ones(4, n, 4)}) for n in LENGTHS]


def language_model(mesh: Mesh, plan: Plan) -> list[AnyProgram]:
    found: list[AnyProgram] = []
    for length in LENGTHS:
        batch = dict.fromkeys(("input_ids", "labels"), torch.zeros(4, length, dtype=torch.long))
        model = gpt.GPT(gpt.Config(vocab=32, context=64, width=16, layers=2, heads=2))
        found.append(compile_program(model, mesh, plan, (), batch, None, {}, found[0] if found else None))
    return found


SCHEME = Scheme({(0, 0): "b", (0, 1): "s"}, {(0, 2): 4})
OF_TOKENS = Scheme({(0, 0): "b", (0, 1): "s", (1, 0): "b", (1, 1): "s"}, {})
CASES: dict[str, tuple[Callable[..., list[AnyProgram]], Scheme, Mesh, Plan]] = {
    "small": (net, SCHEME, Mesh(dp=1), Plan(seed=3)),
    "one rank": (language_model, OF_TOKENS, Mesh(dp=1), Plan()),
    "zero": (language_model, OF_TOKENS, Mesh(dp=2, tp=2), Plan(zero=3)),
    "pipeline": (language_model, OF_TOKENS, Mesh(pp=2), Plan(microbatches=2)),
}


def points(programs: Sequence[AnyProgram], sizes: Sequence[int] = LENGTHS) -> list[Point]:
    """Of programs as the cache has them, of which nobody has read the graphs."""
    kept = [KeptProgram.of(program, program.plan, None, whole=True) for program in programs]
    read = [each.read(program.plan, may_run=False) for each, program in zip(kept, programs)]
    return [Point({"b": 4, "s": size}, program) for size, program in zip(sizes, read)]


def constants(program: AnyProgram) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in program.constants.items()}


def never(*args: Any) -> Family:
    raise AssertionError("fitted again")


@pytest.mark.parametrize("case", some_of(("small",), CASES))
def test_it_is_fitted_once(case: str, cache_folder: Path) -> None:
    make, scheme, mesh, plan = CASES[case]
    programs = make(mesh, plan)
    first = fitted(points(programs), scheme)
    with mock.patch.object(kept_families, "fit", never):
        second = fitted(points(programs), scheme)
    assert (second.forms, second.ranges, second.points) == (first.forms, first.ranges, first.points)
    assert (second.scheme, str(second)) == (scheme, str(first))
    assert str(second.template) == str(first.template) and second.template.plan == first.template.plan == plan
    for sizes in ({"b": 4, "s": 16}, {"b": 4, "s": 20}):
        one, other = first.member(sizes), second.member(sizes)
        assert str(one) == str(other) and second.numbers(sizes) == first.numbers(sizes)
        assert constants(one) == constants(other)
    for sizes in ({"b": 4, "s": 24}, {"b": 2, "s": 8}, {"b": 4, "s": 9}):
        assert first.numbers(sizes) is None and second.numbers(sizes) is None
    assert all(family.extended(programs[0], {"b": 4, "s": 8}) is not None for family in (first, second))


def test_another_program_is_another_family(cache_folder: Path) -> None:
    """Another constant, or the programs as those of other sizes."""
    one, other = net(Mesh(dp=1), Plan()), net(Mesh(dp=1), Plan(), scale=3.0)
    with mock.patch.object(kept_families, "fit", side_effect=kept_families.fit) as fits:
        first = fitted(points(one), SCHEME)
        assert fits.call_count == 1
        again, changed = fitted(points(one), SCHEME), fitted(points(other), SCHEME)
        assert fits.call_count == 2
        assert constants(again.template) == constants(first.template) != constants(changed.template)
        with pytest.raises(NoForm):
            fitted(points(one, (8, 12, 25)), SCHEME)
        assert fits.call_count == 3


def test_that_there_is_none_is_known_too(cache_folder: Path) -> None:
    programs = net(Mesh(dp=1), Plan(), act=torch.sigmoid)
    with pytest.raises(NoForm, match="other operators") as first:
        fitted(points(programs), SCHEME)
    with mock.patch.object(kept_families, "fit", never), pytest.raises(NoForm) as second:
        fitted(points(programs), SCHEME)
    assert str(first.value) == str(second.value)


def test_a_damaged_file_is_made_again(cache_folder: Path) -> None:
    programs = net(Mesh(dp=1), Plan())
    fitted(points(programs), SCHEME)
    (path,) = cache_folder.glob("*-family.program")
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    assert str(fitted(points(programs), SCHEME)) == "b = 4; s = 8 to 20, multiples of 4"


def test_a_second_launch_trains_by_it(cache_folder: Path) -> None:
    found = []
    for fits in (kept_families.fit, never):
        torch.manual_seed(0)
        parallel = autopar.parallelize(Net(None), Mesh(dp=1))
        with mock.patch.object(kept_families, "fit", fits):
            for length in (8, 10, 9, 16):
                loss = parallel(torch.linspace(0, 1, 16 * length).reshape(4, length, 4))
                loss.backward()
                found.append((loss.item(), [parameter.grad.tolist() for parameter in parallel.parameters()]))
        assert len(parallel.families) == 1
    assert found[:4] == found[4:]
