"""Families of models whose Python asks about sizes: numbers as of the model at each length, on real ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.errors import ExportError, TraceError
from autopar.families.sizes import further, reaching
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.program_files.family_file import load_family, member_for, save_family
from tests.launch import run_ranks
from tests.selection import slow_but

EXACT = 1e-10


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.last = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.kind = kind

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = KINDS[self.kind](torch.tanh(self.first(self.table(ids))), ids.shape[1])
        return {"loss": self.last(x).square().mean()}


KINDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a multiple": lambda x, n: x if n % 3 else x * 2,
    "between": lambda x, n: x * 2 if 60 < n < 100 else x,
    "one of a list": lambda x, n: x * 2 if n in [7, 45] else x,
    "a window": lambda x, n: x[:, : min(n, 60)],
    "rows and tokens": lambda x, n: x * 2 if x.shape[0] * n > 300 else x,
    "a factor": lambda x, n: x * (1 + (n % 3 == 0)),
    "divided": lambda x, n: x * 2 if divmod(n, 5)[1] == 2 else x,
    "a power of two": lambda x, n: x * 2 if n & (n - 1) == 0 else x,
    "a number": lambda x, n: x * 2 if int(n) > 50 else x,
    "a square": lambda x, n: x * 2 if math.isqrt(n) ** 2 == n else x,
    "a dict": lambda x, n: x * {45: 2.0}.get(n, 1.0),
    "rows": lambda x, n: x * 2 if len(x) == 6 else x,
}
LENGTHS = (40, 50, 45, 64, 49, 70, 62, 99, 101, 7, 36, 77, 96, 52, 110, 33, 98, 48)


def train(kind: str, mesh: str, plan: dict[str, Any]) -> tuple[list[tuple[int, float]], int, list[str]]:
    """Lengths whose loss or gradients are wrong, with the error; compiles; and what the families say."""
    torch.set_default_dtype(torch.float64)
    model = Net(kind)
    parallel = autopar.parallelize(copy.deepcopy(model), Mesh.parse(mesh), Plan(check_numerics=False, **plan))
    wrong = []
    for step, length in enumerate(LENGTHS):
        ids = torch.randint(0, 16, (4, length), generator=torch.Generator().manual_seed(step))
        expected = model(ids)["loss"]
        expected.backward()
        loss = parallel.train_step(ids=ids)
        error = float((loss - expected).abs().detach())
        for name, parameter in parallel.named_parameters():
            if parameter.grad is not None:
                grad: Any = parameter.grad
                whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                error = max(error, float((whole - model.get_parameter(name).grad).abs().max()))  # type: ignore[operator]
        if error > EXACT:
            wrong.append((length, error))
        parallel.zero_grad()
        model.zero_grad()
    return wrong, len(parallel._programs._compiles.seconds), list(map(str, parallel.families))


CASES = [(kind, "dp=1", {}) for kind in KINDS] + [
    ("a multiple", "dp=2", {"zero": 3}),
    ("between", "tp=2", {}),
    ("between", "pp=2", {"microbatches": 2}),
]


@pytest.mark.parametrize(("kind", "mesh", "plan"), slow_but((1,), CASES))
def test_numbers_at_each_length(kind: str, mesh: str, plan: dict[str, Any]) -> None:
    for wrong, compiles, families in run_ranks(train, Mesh.parse(mesh).world_size, kind, mesh, plan):
        assert not wrong, families
        assert compiles < len(LENGTHS) or kind in ("a number", "a square", "a dict")


def compiled(kind: str, *lengths: int) -> autopar.Family:
    return autopar.compile_family(
        Net(kind), Mesh(dp=1), batches=[{"ids": torch.zeros(4, length, dtype=torch.int64)} for length in lengths]
    )


def test_words_and_a_directory(tmp_path: Path) -> None:
    family = compiled("between", 40, 110)
    assert str(family) == "b = 4 to 6; s = 3 to 110; s <= 60 or s > 60 and s >= 100"
    assert {"b": 4, "s": 60} in family and {"b": 4, "s": 100} in family and {"b": 4, "s": 80} not in family
    read = load_family(save_family(family, tmp_path / "family"))
    assert str(read) == str(family) and {"b": 4, "s": 80} not in read
    with pytest.raises(autopar.ProgramFileError, match=r"4, 80.* none of this family"):
        member_for(read, [[4, 80]])
    with pytest.raises(ExportError, match=r"no way to refuse(.|\n)*family.member"):
        autopar.export(family, tmp_path / "exported", "pt2")
    assert not (tmp_path / "exported").exists()


def test_batches_of_several_kinds_are_refused_with_the_question() -> None:
    with pytest.raises(
        TraceError,
        match=r"asks about sizes \(s <= 60, at test_regions.py.*60 < n < 100.*\), and b=4, s=80 is no",
    ):
        compiled("between", 40, 80)
    with pytest.raises(TraceError, match=r"s == 40, Python makes a number of it, at test_regions.py.*int\(n\) > 50"):
        compiled("a number", 40, 80)


def test_batches_of_one_row() -> None:
    """Among them alone, and once there are larger ones."""
    one = [{"ids": torch.zeros(1, length, dtype=torch.int64)} for length in (40, 50)]
    assert str(autopar.compile_family(Net("a multiple"), Mesh(dp=1), batches=one)).startswith("b = 1; s = 5 to 128")
    more = [{"ids": torch.zeros(4, length, dtype=torch.int64)} for length in (40, 50)]
    parallel = autopar.parallelize(Net("rows"), Mesh(dp=1))
    for batch in (one[0], more[0], one[1], more[1], {"ids": torch.zeros(3, 46, dtype=torch.int64)}):
        assert parallel(**batch)["loss"].isfinite()
    assert any({"b": 4, "s": 46} in family for family in parallel.families)


def test_further_points_keep_to_what_is_asked() -> None:
    points, unit = [{"b": 4, "s": 40}, {"b": 4, "s": 50}], {"b": 1, "s": 1}
    assert further(points, unit, True, lambda sizes: sizes["s"] % 3 != 0) == [{"b": 6, "s": 128}, {"b": 5, "s": 5}]
    assert further(points, unit, True, lambda sizes: sizes["s"] < 60) == [{"b": 6, "s": 59}, {"b": 5, "s": 3}]
    ranges = compiled("a multiple", 40, 50).ranges
    assert reaching({"b": 4, "s": 200}, ranges, lambda sizes: sizes["s"] % 100 == 0) == {"b": 4, "s": 500}
