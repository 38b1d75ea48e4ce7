"""Sizes that forward rounds (strides, windows, images of any height and width): families of them too."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autopar
from autopar import Mesh, Plan
from autopar.errors import ExportError
from autopar.families.family import Family
from autopar.families.forms import NoForm, Terms, symbol
from autopar.families.sizes import Scheme, between
from autopar.ir.size_conditions import Condition, is_rounded, rounded, rounded_in, rounded_of_json
from autopar.program_files.family_file import load_family, save_family
from tests.against_one_process import float64
from tests.selection import slow_but

LENGTHS = [70, 101, 256, 3, 71, 72]
STRIDE = ("add", 1, ("floordiv", ("add", "s", -5), 3))


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 5, stride=3), nn.Conv1d(4, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, wave: Tensor) -> Tensor:
        h = functional.gelu(self.second(functional.gelu(self.first(wave))))
        return self.head(h.mean(-1)).square().mean()


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        beyond = -length % 4
        h = self.up(functional.pad(x, (0, 0, 0, beyond))).view(rows, (length + beyond) // 4, 4, width)
        h = (h + h.mean(2, keepdim=True)).reshape(rows, length + beyond, width)[:, :length]
        return self.head(torch.tanh(h)).square().mean()


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(images)))
        return self.head((h + self.second(h)).mean((2, 3))).square().mean()


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[random.Random], tuple[int, ...]]]] = {
    "strides": (Speech, lambda draw: (draw.choice([4, 6, 8]), 2, draw.randrange(14, 70))),
    "windows": (Windows, lambda draw: (draw.choice([4, 6, 8]), draw.randrange(9, 50), 6)),
    "images": (Images, lambda draw: (draw.choice([4, 6]), 3, draw.randrange(6, 30), draw.randrange(6, 30))),
}
MESHES: list[tuple[str, dict[str, Any]]] = [
    ("dp=2", {"zero": 3}),
    ("tp=2", {}),
    ("dp=2", {}),
    ("pp=2", {"microbatches": 2}),
]
CASES = [(kind, *mesh) for mesh in MESHES for kind in KINDS]


@pytest.mark.parametrize(("kind", "mesh", "plan"), slow_but([0, 4, 2], CASES))
def test_members_are_the_programs_that_are_compiled(
    kind: str, mesh: str, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, shape = KINDS[kind]
    axis, size = mesh.split("=")
    axes, compiled = {axis: int(size)}, list[int]()
    compile_one = autopar.module.cached_program

    def counted(*args: Any) -> Any:
        compiled.append(1)
        return compile_one(*args)

    monkeypatch.setattr("autopar.module.cached_program", counted)
    draw, model = random.Random(1), build().double()
    parallel = autopar.parallelize(model, Mesh(**axes), Plan(**plan))
    for number, sizes in enumerate(dict.fromkeys(shape(draw) for _ in range(14))):
        given = torch.randn(sizes, dtype=torch.float64)
        step = parallel.simulate(given)
        model.zero_grad()
        model(given).backward()
        worst = max(float((step.grads[name] - p.grad).abs().max()) for name, p in model.named_parameters())  # type: ignore[operator]
        assert worst < 1e-12
        if number % 3 or not parallel.families:  # each takes a compile
            continue
        alone = autopar.compile_program(build().double(), Mesh(**axes), Plan(**plan), (given,))
        assert str(parallel.program) == str(alone)
    assert len(compiled) <= 12 and parallel.families


def family_of_strides() -> Family:
    batches = [(torch.zeros(4, 2, length, dtype=torch.float64),) for length in (40, 51)]
    return autopar.compile_family(float64(Speech), Mesh(dp=1), batches=batches)


def test_read_back(tmp_path: Path) -> None:
    family = family_of_strides()
    assert len(family.rounded) == 2 and "(1 + (-5 + n)//3)" in family.rounded
    directory = save_family(family, tmp_path / "family")
    found = load_family(directory)
    assert found.rounded == family.rounded
    for length in (37, 38, 39, 60):
        sizes = {"b": 4, "n": length}
        assert str(found.member(sizes)) == str(family.member(sizes))
    with pytest.raises(ExportError, match="has sizes that are rounded"):
        autopar.export(family, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_steps_that_divide_need_no_rounding() -> None:
    batches = [(torch.zeros(4, length, 6, dtype=torch.float64),) for length in (48, 96)]
    family = autopar.compile_family(float64(Windows), Mesh(dp=1), batches=batches)
    assert (
        "multiples of" in str(family)
        and not any(map(symbol, family.rounded))
        or all(symbol(name) not in form.free_symbols for name in family.rounded for form in family.forms)
    )


class Skip(nn.Module):
    """Halves and doubles, and adds what an odd length has left out: with even ones there is nothing to add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.up, self.head = nn.ConvTranspose1d(4, 4, 2, stride=2), nn.Conv1d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.first(x))
        h = self.up(torch.relu(self.inner(functional.max_pool1d(wide, 2))))
        h = functional.pad(h, (0, wide.shape[2] - h.shape[2]))
        return self.head(torch.cat([wide, h], 1)).square().mean()


def test_lengths_in_steps_make_a_family_in_steps() -> None:
    model = float64(Skip)
    parallel = autopar.parallelize(model, Mesh(dp=2))
    for length in (10, 16, 14, 8, 22, 40, 6, 11):
        given = torch.randn(4, 2, length, dtype=torch.float64)
        assert abs(float(parallel.simulate(given).loss - model(given).detach())) < 1e-12
    (family,) = parallel.families
    assert "multiples of 2" in str(family).partition("n = ")[2] and len(family.points) <= 6


# ---------------------------------------------------------------- parts


def points_of(lengths: list[int]) -> list[dict[str, int]]:
    scheme = Scheme({}, {}, {"r": STRIDE})
    return [dict(scheme.completed({"b": rows, "s": length})) for rows, length in zip([4, 4, 8, 12, 6, 4], lengths)]


def test_expressions_of_rounded_sizes() -> None:
    r, b = symbol("r"), symbol("b")
    points = points_of([28, 40, 12, 60, 29, 30])
    terms = Terms(points, {"r": {"s"}})
    assert terms.form(tuple(point["r"] for point in points)) == r
    assert terms.form(tuple(2 * point["r"] * point["b"] + 3 for point in points)) == 2 * b * r + 3
    with pytest.raises(NoForm):
        terms.form(tuple(point["r"] * point["s"] for point in points))  # of one length twice


def test_rounding_that_nothing_shows_is_no_term() -> None:
    points = points_of([11, 41, 17, 59])  # (s - 5) is a multiple of 3 at all of them
    found = Terms(points, {"r": {"s"}}).form(tuple(point["r"] for point in points))
    assert found == (symbol("s") - 2) / 3


def test_more_points_check_what_is_rounded() -> None:
    points = points_of([28, 40, 12, 60])
    with pytest.raises(NoForm):
        Terms(points, {"r": {"s"}}).form(tuple(point["r"] + point["b"] for point in points))


@pytest.mark.parametrize(
    "data", [["floordiv", "s", 0], ["floordiv", "s", "b"], ["add", "s", 1], ["mod", 4, "s"], 3, "s"], ids=str
)
def test_what_files_may_not_say(data: Any) -> None:
    with pytest.raises(ValueError, match="no "):
        rounded_of_json(data, ["b", "s"])


def test_what_is_rounded_is_found_among_conditions() -> None:
    told, alone = rounded(STRIDE, {"s": 20}), rounded(STRIDE, {"s": 6})
    asked = Condition(("ge", ("floordiv", "s", 2), 0), line="model.py:3")
    assert rounded_in([told, alone, Condition(("ge", "s", 0)), asked]) == {"(1 + (s + -5)//3)": STRIDE}
    assert str(told) == "1 + (s + -5)//3 >= 2" and str(alone) == "1 + (s + -5)//3 == 1"
    assert told.holds({"s": 8}) and not told.holds({"s": 7}) and alone.holds({"s": 7}) and not alone.holds({"s": 8})
    assert is_rounded(STRIDE) and not is_rounded(("add", "s", 1)) and not is_rounded(("floordiv", 7, ("add", "s", -5)))


def test_floor_and_ceiling_are_told_apart() -> None:
    floor, ceiling = ("floordiv", "s", 25), ("floordiv", ("add", "s", 24), 25)
    several = [floor, ("mul", 6, floor), ceiling, ("add", 25, ("mul", 25, floor)), ("add", "s", ("mod", "s", 1))]
    assert list(rounded_in([rounded(part, {"s": 70}) for part in several]).values()) == [floor, ceiling]
    scheme = Scheme({}, {}, {"floor": floor, "ceiling": ceiling})
    points = [dict(scheme.completed({"b": rows, "s": length})) for rows, length in zip([4, 4, 8, 12, 6, 4], LENGTHS)]
    with pytest.raises(NoForm, match="as well as"):  # by these points one is the other and one more, at 75 it is not
        Terms(points, {"floor": {"s"}, "ceiling": {"s"}}).form(tuple(point["ceiling"] for point in points))


def test_points_beside_have_other_remainders() -> None:
    points = [{"b": 4, "s": 28}, {"b": 4, "s": 41}]
    assert between(points, {"b": 1, "s": 1}, lambda sizes: True) == [{"b": 4, "s": 29}, {"b": 4, "s": 30}]
    assert between(points, {"b": 1, "s": 1}, lambda sizes: sizes["s"] != 29) == [{"b": 4, "s": 30}]
    in_steps = [{"b": 4, "s": 64}, {"b": 4, "s": 96}]
    assert between(in_steps, {"b": 1, "s": 1}, lambda sizes: True) == [{"b": 4, "s": 128}]


# ---------------------------------------------------------------- one row


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(h.transpose(1, 2).reshape(rows, length, width)).square().mean()


def test_one_row_on_each_rank_hinders_no_family() -> None:
    parallel = autopar.parallelize(float64(Heads), Mesh(dp=2))
    for rows, length in ((2, 20), (6, 8), (4, 24), (4, 28), (2, 32), (6, 16), (2, 12)):
        parallel.simulate(torch.randn(rows, length, 8, dtype=torch.float64))
    assert sorted(str(family).partition(";")[0] for family in parallel.families) == [
        "b = 2", "b = 4 to 10, multiples of 2",
    ]  # fmt: skip
