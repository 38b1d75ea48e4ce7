"""Comparisons of many names by identity, written out as one expression: a third of the time of a loop over them.

v0["scale"] is v1 and v2["weight"] is v3 and "bias" not in v2 and not v4 and v5.__class__ is v6
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any


def are_told_apart(items: Iterable[Any]) -> bool:
    """Whether ``==`` of these and others is quick, and says what ``is`` would, but for strings."""
    usual: Any = object.__eq__
    return all(type(item) is str or type(item).__eq__ is usual for item in items)


def names_hold(
    present: Sequence[tuple[Any, Hashable, Any]],
    absent: Sequence[tuple[Mapping[Any, Any], Hashable]],
    empty: Sequence[Mapping[Any, Any]],
    classes: Sequence[tuple[Any, type]] = (),
    contents: Sequence[tuple[Any, tuple[Any, ...]]] = (),
    functions: Sequence[tuple[FunctionType, tuple[Any, ...]]] = (),
) -> Callable[[], bool]:
    """A function that says whether ``table[key] is value`` for all of ``present``, and ``absent`` and ``empty`` hold.

    Also whether objects are of their ``classes``, containers have their ``contents`` (of a dict its keys, then its
    values; items of which :func:`are_told_apart`), and ``functions`` their code, defaults, and defaults by name. It
    raises KeyError, or what else a table raises, where a name is gone.
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
    terms += [f"type({named(one)}) is {named(cls)}" for one, cls in classes]
    for container, items in contents:
        name = named(container)
        held = f"(*{name}, *{name}.values())" if isinstance(container, dict) else f"(*{name},)"
        terms.append(f"{held} == {named(items)}" if items else f"not {name}")
    for function, (code, defaults, by_name) in functions:
        name = named(function)
        parts = ("__code__", code), ("__defaults__", defaults), ("__kwdefaults__", by_name)
        terms += [f"{name}.{part} is {named(value)}" for part, value in parts]
    source = "def holds():\n    return " + (" and ".join(terms) or "True")
    exec(source, objects)  # our own source: names of users are string literals in it
    found: Callable[[], bool] = objects["holds"]
    return found
