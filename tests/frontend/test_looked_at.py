"""Python that looks at values: the branch of the batch is taken, another batch takes another program, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.check import Reference, check
from autopar.errors import ProgramFileError, TraceError
from autopar.ir.value_guards import MOST_OUTCOMES
from tests.against_one_process import difference
from tests.launch import run_ranks
from tests.observation.test_observation import compare
from tests.selection import slow_but


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(8, 8), form
        self.register_buffer("ready", torch.tensor([True]))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        h = FORMS[self.form](self, self.linear(x), x)
        return h.square().mean()


def skips_mask(self: Net, h: Tensor, x: Tensor) -> Tensor:
    mask = x[..., 0] > 0
    return h if mask.all() else h * mask[..., None]


def longest(self: Net, h: Tensor, x: Tensor) -> Tensor:
    lengths = (x[..., 0] > 0).sum(1)
    return h * (torch.arange(int(lengths.max().item()) + 1).sum() + 1)


def cut_to_longest(self: Net, h: Tensor, x: Tensor) -> Tensor:
    return h[:, : max(1, int((x[..., 0] > 0).sum(1).max()))]


def two_looks(self: Net, h: Tensor, x: Tensor) -> Tensor:
    if (x[..., 0] > 0).any():
        return h * 3 if float(x[0, 0, 0]) > 0 else h * 5
    return -h


def asserted(self: Net, h: Tensor, x: Tensor) -> Tensor:
    assert torch.isfinite(x).all() and not torch.equal(x, torch.zeros_like(x))
    return h


def initialised(self: Net, h: Tensor, x: Tensor) -> Tensor:
    return h if self.ready else h * 2


def now_and_then(self: Net, h: Tensor, x: Tensor) -> Tensor:
    return h * 2 if self.steps >= 100 else h


FORMS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    each.__name__: each
    for each in (skips_mask, longest, cut_to_longest, two_looks, asserted, initialised, now_and_then)
}


def batches() -> list[Tensor]:
    """All positive, some, fewer, none (where the first rows of the batch do not tell)."""
    positive = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    some, fewer = positive.clone(), positive.clone()
    some[3, 4:] *= -1
    fewer[:, 2:] *= -1
    fewer[0] *= -1
    return [positive, some, fewer, -positive]


@pytest.mark.parametrize("form", slow_but([0, 3, 4, 5, 6], FORMS))
def test_each_batch_takes_its_branch(form: str) -> None:
    torch.manual_seed(0)
    model = Net(form)
    parallel = autopar.parallelize(copy.deepcopy(model), Mesh(dp=2))
    for x in (*batches(), *batches()):
        compare(parallel, model, x)
    assert len(parallel._programs) <= 4
    for each in (model, parallel):
        each.ready.fill_(False)
        each.steps.fill_(100)
    compare(parallel, model, batches()[0])
    assert check(model, {"x": batches()[1]}, Mesh(dp=2, tp=2)).passed


def one_of_two() -> list[float]:
    torch.set_default_dtype(torch.float64)
    found = []
    for form in ("skips_mask", "cut_to_longest", "two_looks"):
        torch.manual_seed(0)
        model = Net(form)
        parallel = autopar.parallelize(copy.deepcopy(model), Mesh(dp=2))
        for x in (*batches(), *batches()):
            parallel.zero_grad()
            model.zero_grad()
            loss, expected = parallel(x), model(x)
            loss.backward()
            expected.backward()
            found.append(difference(loss, expected))
            found.append(difference(parallel.linear.weight.grad.full_tensor(), model.linear.weight.grad))
    return found


def test_on_two_processes() -> None:
    for found in run_ranks(one_of_two, 2):
        assert max(found) < 1e-12


class Stages(nn.Module):
    """What only buffers decide; ``counts``: forward writes into one of them."""

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.counts = nn.Linear(8, 8), nn.Linear(8, 8), counts
        self.register_buffer("ready", torch.tensor([True]))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        h = self.down(h if self.ready else h * 2)
        if self.counts:
            self.steps += 1
            h = h * 2 if self.steps > 3 else h
        return h.square().mean()


@pytest.mark.parametrize(
    "mesh, plan",
    [(Mesh(pp=2), {"microbatches": 2}), (Mesh(dp=2), {"microbatches": 2}), (Mesh(dp=2), {"inputs": "local"})],
    ids=["pp", "microbatches", "local"],
)
def test_buffers_decide_for_all_parts(mesh: Mesh, plan: dict[str, Any]) -> None:
    model, x = Stages(), batches()[0]
    parallel = autopar.parallelize(copy.deepcopy(model), mesh, Plan(**plan))
    compare(parallel, model, x)
    for each in (model, parallel):
        each.ready.fill_(False)
    compare(parallel, model, x)
    if mesh.is_pipelined:
        with pytest.raises(TraceError, match=r"(?s)self.steps > 3.*'steps', a buffer that forward writes.*Way out"):
            autopar.parallelize(Stages(counts=True), mesh, Plan(**plan)).simulate(x)


class Looks(nn.Module):
    def __init__(self, look: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.look = nn.Linear(8, 8), look

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h.mean() * (2 if self.look(h, x) else 3)


@pytest.mark.parametrize(
    "look, plan, words",
    [
        (lambda h, x: h.sum() > 0, {}, ("computed from parameters", "2 if self.look(h, x)")),
        (lambda h, x: bool(h.sum() > 0), {}, ("computed from parameters", "bool(h.sum() > 0)")),
        (lambda h, x: torch.rand(1).item() < 0.5, {}, ("random number", "torch.rand(1).item()")),
        (lambda h, x: x.sum() > 0, {"microbatches": 2}, ("parts of it", "2 if self.look(h, x)", "microbatches")),
    ],
)
def test_refused_with_the_line(look: Any, plan: dict[str, Any], words: tuple[str, ...]) -> None:
    model, x = Looks(look), torch.randn(4, 8)
    with pytest.raises(TraceError) as refusal:
        autopar.parallelize(model, Mesh(dp=2), Plan(**plan)).simulate(x=x)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "Way out" in str(refusal.value) and "test_looked_at.py" in str(refusal.value)
    model(x)


def test_too_many_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_OUTCOMES > 3
    monkeypatch.setattr("autopar.calls.variants.MOST_OUTCOMES", 3)
    parallel = autopar.parallelize(Looks(lambda h, x: int(x[0, 0]) == -1), Mesh(dp=2))
    for number in range(3):
        parallel.simulate(torch.full((4, 8), float(number)))
    with pytest.raises(TraceError, match=r"(?s)3 programs.*int\(x\[0, 0\]\).*Way out"):
        parallel.simulate(torch.full((4, 8), 99.0))
    parallel.simulate(torch.full((4, 8), 2.0))


def test_such_a_program_is_not_taken_from_a_file(tmp_path: Path) -> None:
    model, x = Net("skips_mask"), batches()[0]
    autopar.compile_program(model, Mesh(dp=2), Plan(), (x,)).save(tmp_path / "out")
    with pytest.raises(ProgramFileError, match="values in tensors that Python looks at.*mask.all"):
        autopar.parallelize(model, program=tmp_path / "out")


class Codebook(nn.Module):
    """A flag in a buffer says whether the table is ready; the table follows what is learned (VQ-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("ready", torch.tensor(True))
        self.register_buffer("table", torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if not self.ready:
            self.table.data.copy_(h.detach()[:5])
            self.ready.data.copy_(torch.tensor(True))
        near = torch.cdist(h.detach(), self.table).argmin(-1)
        picked = self.table[near]
        chosen = nn.functional.one_hot(near, 5).to(h.dtype)
        self.table.data.lerp_(chosen.t() @ h.detach() / chosen.sum(0).clamp(min=1)[:, None], 0.1)
        return (h - picked).square().mean()


def test_a_flag_beside_buffers_that_follow_what_is_learned() -> None:
    torch.manual_seed(0)
    reference = Reference(Codebook().double(), {"x": torch.randn(8, 8, dtype=torch.float64)})
    for mesh in (Mesh(dp=2), Mesh(tp=2)):
        assert reference.check(mesh, Plan()).worst < 1e-12
