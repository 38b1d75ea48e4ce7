"""Guards by name, written out: each name is still compared by identity, and what comes anew is still seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.ir.guards import FREQUENT, Contents, Guards, Reading
from autopar.ir.names_hold import are_told_apart, names_hold

SCALE, OTHER = object(), object()


def test_each_name_is_compared() -> None:
    table: dict[Any, Any] = {"scale": SCALE, "it's": None, 3: True, (1, "x"): OTHER}
    hooks: dict[str, Any] = {}
    present = [(table, key, value) for key, value in table.items()]
    holds = names_hold(present, [(table, "bias")], [hooks])
    assert holds() and names_hold([], [], [])()
    for key, value in list(table.items()):
        table[key] = 1
        assert not holds()
        del table[key]
        with pytest.raises(KeyError):
            holds()
        table[key] = value
    table["bias"] = None
    assert not holds()
    del table["bias"]
    hooks["one"] = 1
    assert not holds()


class Table(dict[str, Any]):
    pass


class Other(Table):
    pass


def edited(scale: float = 2.0, *, shift: float = 1.0) -> float:
    return scale + shift


def test_classes_contents_and_functions_are_compared() -> None:
    owner, held, many = Table(), {"up": SCALE, "down": OTHER}, [SCALE, "names"]
    before: Any = (edited.__code__, edited.__defaults__, edited.__kwdefaults__)
    contents: list[Any] = [(held, (*held, *held.values())), (many, tuple(many)), (owner, ())]
    holds = names_hold([], [], [], [(owner, Table)], contents, [(edited, before)])
    assert holds()
    for change, back in (
        (lambda: setattr(owner, "__class__", Other), lambda: setattr(owner, "__class__", Table)),
        (lambda: held.update(up=OTHER), lambda: held.update(up=SCALE)),
        (lambda: held.update(new=SCALE), lambda: held.pop("new")),
        (lambda: held.update(up=held.pop("up")), lambda: held.update(down=held.pop("down"))),  # in another order
        (lambda: many.reverse(), lambda: many.reverse()),
        (lambda: owner.update(one=1), lambda: owner.clear()),
        (lambda: setattr(edited, "__defaults__", (3.0,)), lambda: setattr(edited, "__defaults__", before[1])),
        (lambda: setattr(edited, "__kwdefaults__", {}), lambda: setattr(edited, "__kwdefaults__", before[2])),
    ):
        change()
        assert not holds()
        back()
        assert holds()


def test_what_equals_others_is_not_written_out() -> None:
    assert are_told_apart((SCALE, "name", nn.Linear(1, 1), nn.functional))
    assert not any(are_told_apart((value,)) for value in (1, True, 1.0, (1,), torch.ones(1), Path("a")))


def test_contents_that_are_not_written_out_are_compared_too() -> None:
    sizes: list[Any] = [1, 2.5]
    guards = Guards([Reading({"a": SCALE}, "a", SCALE, "a")], contents=[Contents.of(sizes, "sizes")])
    assert all(guards.hold() for _ in range(FREQUENT + 2))
    sizes[0] = True  # which equals 1
    assert not guards.hold()


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "another value": lambda own, hooks: own.update(scale=2.0),
    "no value": lambda own, hooks: own.pop("scale"),
    "a value that was not there": lambda own, hooks: own.update(bias=1),
    "a hook": lambda own, hooks: hooks.update(one=1),
}


@pytest.mark.parametrize("calls", [1, FREQUENT, FREQUENT + 3])
@pytest.mark.parametrize("change", CHANGES)
def test_guards_hold_until_something_changes(change: str, calls: int) -> None:
    own: dict[str, Any] = {"scale": 1.5}
    hooks: dict[str, Any] = {}
    guards = Guards([Reading(own, "scale", own["scale"], "scale")], [(own, "bias", "bias")], [(hooks, "hooks")])
    for _ in range(calls):
        assert guards.hold()
    own["scale"] = float("1.5")  # an equal one, another object
    assert guards.hold() and guards.hold()
    CHANGES[change](own, hooks)
    assert not guards.hold() and guards.change()
