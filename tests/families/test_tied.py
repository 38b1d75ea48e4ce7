"""Sizes of inputs that follow from others (labels one shorter, targets twice as long): families of these too."""

from __future__ import annotations

import copy
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
from autopar.errors import ProgramFileError
from autopar.families.sizes import Scheme
from autopar.families.tied import never_one, ties
from autopar.ir.size_conditions import Condition, rounded
from autopar.program_files.family_file import load_family, member_for, save_family
from tests.against_one_process import float64
from tests.selection import slow_but

FEATURES = ("add", 1, ("floordiv", ("add", "n", -1), 2))


class TwiceAsLong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv1d(2, 4, 3, padding=1), nn.ConvTranspose1d(4, 2, 2, stride=2)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(self.up(torch.tanh(self.first(x))), target)


class NextWord(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embedding(ids)))
        return functional.cross_entropy(logits[:, : labels.shape[1]].reshape(-1, 20), labels.reshape(-1))


class Shorter(NextWord):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(torch.tanh(self.embedding(ids)))[:, :-1]
        return functional.cross_entropy(logits.reshape(-1, 20), labels.reshape(-1))


class Flat(NextWord):
    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(torch.tanh(self.embedding(ids))).flatten(0, 1), labels)


class Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(torch.tanh(self.first(images))), labels)


def twice(rows: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    length = draw.randrange(3, 40)
    return torch.randn(rows, 2, length).double(), torch.randn(rows, 2, 2 * length).double()


def shorter(rows: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    length = draw.randrange(4, 40)
    return torch.randint(20, (rows, length)), torch.randint(20, (rows, length - 1))


def flat(rows: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    length = draw.randrange(4, 40)
    return torch.randint(20, (rows, length)), torch.randint(20, (rows * length,))


def segments(rows: int, draw: random.Random) -> tuple[Tensor, Tensor]:
    high, wide = draw.randrange(5, 20), draw.randrange(5, 20)
    return torch.randn(rows, 2, high, wide).double(), torch.randint(5, (rows, (high + 1) // 2, (wide + 1) // 2))


Batches = Callable[[int, random.Random], tuple[Tensor, Tensor]]
KINDS: dict[str, tuple[type[nn.Module], Batches, int]] = {  # with the most compiles of 14 batches
    "twice": (TwiceAsLong, twice, 6),
    "shorter": (Shorter, shorter, 6),
    "a part": (NextWord, shorter, 7),
    "flat": (Flat, flat, 6),
    "segments": (Segments, segments, 9),
}
MESHES: list[tuple[dict[str, int], dict[str, Any]]] = [({"dp": 2}, {"zero": 3}), ({"tp": 2}, {})]
CASES = [(kind, *mesh) for kind in KINDS for mesh in MESHES]


@pytest.mark.parametrize(("kind", "axes", "plan"), slow_but([0, 3, 6], CASES), ids=str)
def test_few_compiles(kind: str, axes: dict[str, int], plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    build, batches, most = KINDS[kind]
    compiled, compile_one = list[int](), autopar.module.cached_program

    def counted(*args: Any) -> Any:
        compiled.append(1)
        return compile_one(*args)

    monkeypatch.setattr("autopar.module.cached_program", counted)
    draw, model = random.Random(5), float64(build)
    parallel = autopar.parallelize(model, Mesh(**axes), Plan(**plan))
    for _ in range(14):
        batch = batches(draw.choice([4, 6, 8]), draw)
        step = parallel.simulate(*batch)
        model.zero_grad()
        model(*batch).backward()
        assert max(float((step.grads[name] - p.grad).abs().max()) for name, p in model.named_parameters()) < 1e-12  # type: ignore[operator]
    assert len(compiled) <= most and parallel.families
    alone = autopar.compile_program(float64(build), Mesh(**axes), Plan(**plan), batch)
    assert str(parallel.program) == str(alone)


def family_of_targets() -> Any:
    batches = [(torch.zeros(4, 2, n).double(), torch.zeros(4, 2, 2 * n).double()) for n in (12, 29)]
    return autopar.compile_family(float64(TwiceAsLong), Mesh(dp=1), batches=batches)


def test_read_back(tmp_path: Path) -> None:
    family = family_of_targets()
    assert str(family) == "b = 4 to 6; n = 3 to 64; n2 = 2*n"
    found = load_family(save_family(family, tmp_path / "family"))
    assert str(found) == str(family)
    assert str(member_for(found, [(4, 2, 31), (4, 2, 62)])) == str(family.member({"b": 4, "n": 31}))
    with pytest.raises(ProgramFileError, match="n2 = 2[*]n"):
        member_for(found, [(4, 2, 31), (4, 2, 61)])


def test_one_file_for_all(tmp_path: Path) -> None:
    model = float64(TwiceAsLong)
    autopar.export(family_of_targets(), tmp_path / "out", "pt2", weights_from=model)
    (file,) = (tmp_path / "out").rglob("*.pt2")
    run = torch.export.load(file).module()
    for length in (5, 31):
        batch = twice(4, random.Random(length))
        assert torch.allclose(pick(run(*batch)), model(*batch), rtol=0, atol=1e-12)


def pick(found: Any) -> Tensor:
    return found[0] if isinstance(found, (tuple, list)) else found


class Beyond(nn.Module):
    """Where y has one column, squeeze takes the dim away: torch does not ask that of the size of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.bmm((x * self.weight)[:, None, 4:], y[:, :, None])
        return both.square().mean() + (y * self.weight).squeeze(1).sum(-1).square().mean()


def test_a_size_of_one_has_a_program_of_its_own() -> None:
    model = float64(Beyond)
    parallel = autopar.parallelize(copy.deepcopy(model), Mesh())
    for length in (12, 29, 17, 6, 5):
        x, y = torch.randn(4, length).double(), torch.randn(4, length - 4).double()
        step = parallel.simulate(x, y)
        model.zero_grad()
        model(x, y).backward()
        assert abs(float(step.grads["weight"] - model.weight.grad)) < 1e-12  # type: ignore[operator]
    (family,) = parallel.families
    assert str(family) == "b = 4 to 6; n = 6 to 64; n2 = -4 + n"


# ---------------------------------------------------------------- parts

POINTS = [{"b": 4, "n": 20, "n2": 40}, {"b": 4, "n": 33, "n2": 66}]
TWICE = Condition(("eq", ("mul", "b", "n2"), ("mul", 2, "b", "n")))


def test_two_points_on_a_line_are_no_reason() -> None:
    assert ties(POINTS, []) == {}
    assert ties(POINTS, [Condition(("ge", "n2", "n"))]) == {}
    assert ties(POINTS, [Condition(("eq", ("mod", "n2", 2), 0))]) == {}
    assert ties(POINTS, [TWICE]) == {"n2": ("mul", 2, "n")}
    assert ties(POINTS, [Condition(("eq", ("mod", ("add", "n", "n2"), 3), 0))]) == {}
    assert ties([*POINTS, {"b": 4, "n": 9, "n2": 20}], [TWICE]) == {}


def test_what_is_tied_is_never_one() -> None:
    tied = {"n2": ("add", -4, "n"), "s": "n"}
    (alone,), (least,) = never_one(tied, {"n": 5}), never_one(tied, {"n": 6})
    assert least.holds({"n": 9}) and not least.holds({"n": 5}) and not least.holds({"n": 4})
    assert alone.holds({"n": 5}) and not alone.holds({"n": 6})


def test_what_is_rounded_needs_no_other_reason() -> None:
    points = [{"b": 4, "n": 20, "s": 10}, {"b": 4, "n": 33, "s": 17}]
    told = rounded(FEATURES, points[0])
    assert ties(points, [told]) == {"s": FEATURES}
    assert ties([*points, {"b": 4, "n": 35, "s": 17}], [told]) == {}


def test_products_of_rows_and_lengths() -> None:
    points = [{"b": 4, "s": 5, "b2": 20}, {"b": 4, "s": 9, "b2": 36}]
    assert ties(points, [Condition(("eq", "b2", ("mul", "b", "s")))]) == {"b2": ("mul", "s", "b")}
    assert ties(points, [Condition(("eq", "b2", ("mul", 4, "s")))]) == {"b2": ("mul", 4, "s")}


def test_no_size_is_tied_to_one_that_is() -> None:
    points = [{"b": 4, "s": 5, "s2": 4, "s3": 10}, {"b": 4, "s": 9, "s2": 8, "s3": 18}]
    asked = [Condition(("eq", "s2", ("add", -1, "s"))), Condition(("eq", "s3", ("add", 2, ("mul", 2, "s2"))))]
    assert ties(points, [*asked, Condition(("eq", "s3", ("mul", 2, "s")))]) == {
        "s3": ("mul", 2, "s"), "s2": ("add", -1, "s"),
    }  # fmt: skip
    assert ties(points, asked) == {"s3": ("add", 2, ("mul", 2, ("add", -1, "s"))), "s2": ("add", -1, "s")}


def test_sizes_of_a_call() -> None:
    scheme = Scheme({(0, 0): "b", (0, 1): "n", (1, 1): "n2"}, {(1, 0): 3}, tied={"n2": ("mul", 2, "n")})
    assert scheme.sizes(((4, 7), (3, 14))) == {"b": 4, "n": 7}
    assert scheme.sizes(((4, 7), (3, 13))) is None
    assert scheme.shapes(((4, 7), (3, 14)), {"b": 2, "n": 5}) == ((2, 5), (3, 10))
