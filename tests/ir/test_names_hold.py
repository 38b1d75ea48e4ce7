"""Guards by name, written out: each name is still compared by identity, and what comes anew is still seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autopar.ir.guards import FREQUENT, Guards, Reading
from autopar.ir.names_hold import names_hold

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
