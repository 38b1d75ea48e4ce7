"""Sizes that depend on values and cannot stay unknown: a program for each size, which is looked at before each call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import autopar
from autopar import Mesh
from autopar.errors import TraceError
from autopar.ir.value_guards import MOST_OUTCOMES
from autopar.selections.known_sizes import depends_on_values, with_sizes
from tests.observation.test_observation import compare


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Sized(TorchFunctionMode):
    """Every size that depends on values is asked for; ``seen`` has the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if depends_on_values(func, args, kwargs or {}):
            return with_sizes(func, args, kwargs or {}, self._count)
        return func(*args, **(kwargs or {}))

    def _count(self, tensor: Tensor) -> int:
        self.seen.append(int(tensor))
        return self.seen[-1]


def put(x: Tensor, mask: Tensor) -> Tensor:
    out = x.clone()
    out[mask] = x[mask].cumsum(0)
    return out


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "rows": lambda x, mask: x[mask],
    "within an index": lambda x, mask: x[:, mask[0], 1:],
    "with positions": lambda x, mask: x[mask[:, 0], 1],
    "put": put,
    "nonzero": lambda x, mask: (mask.nonzero(), torch.nonzero(x[..., 0] > 0), torch.argwhere(mask)),
    "as tuple": lambda x, mask: (*mask.nonzero(as_tuple=True), *torch.where(mask)),
    "unique": lambda x, mask: torch.unique((x * 2).long(), return_inverse=True, return_counts=True),
    "unique of rows": lambda x, mask: (x[..., 0] * 3).long().unique(),
    "in a row": lambda x, mask: torch.unique_consecutive(mask.flatten().long(), return_inverse=True),
    "repeated": lambda x, mask: torch.repeat_interleave(x, mask.sum(1), dim=0),
    "repeated flat": lambda x, mask: x[:, 0, 0].repeat_interleave(mask.sum(1)),
}


@pytest.mark.parametrize("chosen", ["some", "all", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_as_torch(form: str, chosen: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, random = torch.randn(6, 4, 3, generator=generator), torch.randn(6, 4, generator=generator) > 0
    mask = {"some": random, "all": torch.ones_like(random), "none": torch.zeros_like(random)}[chosen]
    expected = FORMS[form](x, mask)
    with Sized() as sized:
        found = FORMS[form](x, mask)
    assert sized.seen
    for one, other in zip(found if isinstance(found, tuple) else [found], expected):
        other = expected if not isinstance(found, tuple) else other
        assert one.dtype == other.dtype and torch.equal(one, other)


class Net(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.form = nn.Linear(8, 8), form

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.form(self.layer(x), labels)


def among_each_other(h: Tensor, labels: Tensor) -> Tensor:
    rows = h[labels >= 0]
    return (rows @ rows.T).softmax(-1).square().sum() + rows.max()


def kinds_of_labels(h: Tensor, labels: Tensor) -> Tensor:
    kinds, which, count = torch.unique(labels, return_inverse=True, return_counts=True)
    return (torch.zeros(len(kinds), 8).index_add(0, which.flatten(), h.flatten(0, 1)).square().sum(1) / count).sum()


def one_after_the_other(h: Tensor, labels: Tensor) -> Tensor:
    total = h.sum() * 0
    for place in (labels[0] >= 0).nonzero():
        total = total + h[:, place].square().mean()
    return total


def if_there_is_any(h: Tensor, labels: Tensor) -> Tensor:
    mask = labels >= 0
    return F.cross_entropy(h[mask], labels[mask]) if mask.any() else h.sum() * 0


def batch(kept: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(kept)
    labels = torch.randint(0, 8, (4, 6), generator=generator)
    labels[:, kept:] = -100
    return {"x": torch.randn(4, 6, 8, generator=generator), "labels": labels}


@pytest.mark.parametrize(
    "form",
    [
        among_each_other,
        if_there_is_any,
        *(pytest.param(form, marks=pytest.mark.slow) for form in (kinds_of_labels, one_after_the_other)),
    ],
    ids=lambda form: form.__name__,
)
def test_a_program_for_each_size(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Net(form)
    parallel = autopar.parallelize(copy.deepcopy(model), Mesh(dp=2, tp=2))
    for kept in (4, 2, 4):
        compare(parallel, model, *batch(kept).values())
    sizes = 1 if form is if_there_is_any else 2
    assert len(parallel._programs) == sizes
    if form is if_there_is_any:
        compare(parallel, model, *batch(0).values())
        assert len(parallel._programs) == 2


def test_too_many_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autopar.calls.variants.MOST_OUTCOMES", 2)
    assert MOST_OUTCOMES > 2
    parallel = autopar.parallelize(Net(among_each_other), Mesh(dp=2))
    for kept in (4, 2):
        parallel.simulate(**batch(kept))
    with pytest.raises(TraceError, match=r"(?s)2 programs.*rows = h\[labels >= 0\].*8 was seen, and now 12.*Way out"):
        parallel.simulate(**batch(3))
