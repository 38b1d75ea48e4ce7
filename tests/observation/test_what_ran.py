"""What methods of objects read that forward makes, and what functions read that remember: guards hold it too."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import split_program
from autopar.observation.observation import guards_of_traces

SCALE, FACTOR = 2.0, 1.0


class Sizes:
    def __init__(self) -> None:
        self.scale, self.of_no_matter = 2.0, 1


SIZES = Sizes()
ACT = nn.LeakyReLU(0.2)


class Maker:
    def run(self, x: Tensor) -> Tensor:
        return x * SCALE

    def never(self) -> float:
        return FACTOR


class Calls(Maker):
    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)


class World:
    """Leads to all of a program, as a trainer does, or the configuration of a test."""

    def __init__(self) -> None:
        self.factor = 2.0

    def described(self) -> str:
        return f"{FACTOR} {self.factor}"


WORLD = World()


def fail(x: Tensor) -> None:
    raise ValueError(f"{x.shape} {WORLD.described()}")


class Careful(Maker):
    def run(self, x: Tensor) -> Tensor:
        if x.dim() > 8:
            fail(x)
        return x * SCALE


class OfAnObject:
    @property
    def size(self) -> float:
        return SIZES.scale


class OfAModule:
    @staticmethod
    def run(x: Tensor) -> Any:
        return ACT(x)


def around(number: float) -> Callable[[], float]:
    held = SimpleNamespace(number=number)

    class Inside:
        def get(self) -> float:
            return float(held.number * SCALE)

    return lambda: Inside().get()


class Inner:
    def __init__(self) -> None:
        self.factor = 2.0

    def make(self) -> float:
        return self.factor * FACTOR


class Remembers:
    def __init__(self) -> None:
        self.inner = Inner()

    @functools.lru_cache(None)  # noqa: B019
    def scale(self) -> float:
        return self.inner.make()


OWNER = Remembers()
TABLE = {"calls": Calls}
HERE = globals()


@functools.cache
def remembered() -> float:
    return OWNER.inner.make()


class Net(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.body, self.owner, self.call = nn.Linear(4, 4), body, OWNER, Calls()
        self.inside = around(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.up(x)).square().mean()


CASES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any, str]] = {
    "a global, by a method of what forward makes": (lambda net, x: Maker().run(x), HERE, "SCALE"),
    "a global, by a call of an object": (lambda net, x: net.call(x), HERE, "SCALE"),
    "a global, by the base of a class in a table": (lambda net, x: TABLE["calls"]()(x), HERE, "SCALE"),
    "an object, by a property": (lambda net, x: x * OfAnObject().size, vars(SIZES), "scale"),
    "a module, by a static method": (lambda net, x: OfAModule().run(x), vars(ACT), "negative_slope"),
    "a global, by a class within a function": (lambda net, x: x * net.inside(), HERE, "SCALE"),
    "a global, by a method that remembers": (lambda net, x: x * net.owner.scale(), HERE, "FACTOR"),
    "an object, by a method that remembers": (lambda net, x: x * net.owner.scale(), vars(OWNER.inner), "factor"),
    "a global, by a function that remembers": (lambda net, x: x * remembered(), HERE, "FACTOR"),
    "an object, by a copy": (lambda net, x: x * copy.copy(net.owner.inner).factor, vars(OWNER.inner), "factor"),
    "an object, by a deep copy": (
        lambda net, x: x * copy.deepcopy(net.owner).inner.factor,
        vars(OWNER.inner),
        "factor",
    ),
    "a global, by a method of a copy": (lambda net, x: x * copy.copy(net.owner.inner).make(), HERE, "FACTOR"),
    "a global, by a method of another one": (lambda net, x: x * type(net.owner.inner)().make(), HERE, "FACTOR"),
    "an object, by a function that remembers": (lambda net, x: x * remembered(), vars(OWNER.inner), "factor"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_has_to_stay(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, table, name = CASES[case]
    monkeypatch.setitem(table, name, table.get(name, 2.0))
    OWNER.scale()
    remembered()
    with guards_of_traces() as guards:
        split_program(Net(body), Mesh(dp=2), Plan(), (torch.ones(4, 4),), after="trace")
    assert guards.hold()
    monkeypatch.setitem(table, name, 3.0)
    assert name in guards.change() and not guards.hold()
    monkeypatch.undo()
    assert guards.hold()


def test_what_did_not_run_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with guards_of_traces() as guards:
        split_program(Net(lambda net, x: Careful().run(x)), Mesh(dp=2), Plan(), (torch.ones(4, 4),), after="trace")
    monkeypatch.setitem(HERE, "FACTOR", 5.0)
    monkeypatch.setattr(WORLD, "factor", 3.0)
    assert guards.hold() and not any("WORLD" in one.label for one in guards.readings)
    monkeypatch.setitem(HERE, "SCALE", 5.0)
    assert not guards.hold()


def edited(x: Tensor) -> Tensor:
    return x * 2.0


def edited_later(x: Tensor) -> Tensor:
    return x * 3.0


@pytest.mark.parametrize("part", ["__code__", "__defaults__"])
def test_functions_may_be_edited_while_the_process_runs(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``%autoreload`` of IPython does, which puts new code into the functions that there are."""
    with guards_of_traces() as guards:
        split_program(Net(lambda net, x: edited(x)), Mesh(dp=2), Plan(), (torch.ones(4, 4),), after="trace")
    assert guards.hold()
    monkeypatch.setattr(edited, part, edited_later.__code__ if part == "__code__" else (torch.ones(4, 4),))
    assert "the code of edited" in guards.change() and not guards.hold()
    monkeypatch.undo()
    assert guards.hold()


def test_what_is_not_read_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    with guards_of_traces() as guards:
        split_program(
            Net(lambda net, x: Calls()(x) * OfAnObject().size), Mesh(dp=2), Plan(), (torch.ones(4, 4),), after="trace"
        )
    monkeypatch.setitem(HERE, "FACTOR", 5.0)
    monkeypatch.setattr(SIZES, "of_no_matter", 2)
    assert guards.hold()
