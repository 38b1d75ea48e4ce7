"""Comparisons of many names by identity, written out as one expression: a third of the time of a loop over them.

t0["scale"] is v0 and t1["weight"] is v1 and "bias" not in t1 and not t2
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any


def names_hold(
    present: Sequence[tuple[Any, Hashable, Any]],
    absent: Sequence[tuple[Mapping[Any, Any], Hashable]],
    empty: Sequence[Mapping[Any, Any]],
) -> Callable[[], bool]:
    """A function that says whether ``table[key] is value`` for all of ``present``, and ``absent`` and ``empty`` hold.

    It raises KeyError, or what else a table raises, where a name is gone.
    """
    objects: dict[str, Any] = {}
    known: dict[int, str] = {}

    def named(thing: Any) -> str:
        if thing is None or thing is True or thing is False:
            return repr(thing)
        if id(thing) not in known:
            known[id(thing)] = f"v{len(known)}"
            objects[known[id(thing)]] = thing
        return known[id(thing)]

    def key_of(key: Hashable) -> str:
        return repr(key) if type(key) is str else named(key)

    terms = [f"{named(table)}[{key_of(key)}] is {named(value)}" for table, key, value in present]
    terms += [f"{key_of(key)} not in {named(table)}" for table, key in absent]
    terms += [f"not {named(table)}" for table in empty]
    source = "def holds():\n    return " + (" and ".join(terms) or "True")
    exec(source, objects)  # our own source: names of users are string literals in it
    found: Callable[[], bool] = objects["holds"]
    return found
