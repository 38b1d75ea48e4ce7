"""One digest for a whole table: equal where all is equal, whoever shares what; another for each change."""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import FunctionType
from typing import Any
from unittest import mock

import pytest
from torch import nn

from autopar.cache import assumptions
from autopar.cache.transcript import Transcript
from tests.cache.launches import Launches


class Kind(enum.Enum):
    ONE = 1
    OTHER = 2


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held

    def of(self) -> Any:
        return self.held


def digest_of(*values: Any, followed: frozenset[str] = frozenset()) -> str:
    transcript = Transcript(lambda _: None, followed)
    transcript.dump(list(values))
    return transcript.digest()


def text(content: str) -> str:
    """One that is no object of before."""
    return "".join(list(content))


def in_itself(value: Any) -> list[Any]:
    found: list[Any] = [value]
    found.append(found)
    return found


def made(constant: int, around: Any = None) -> FunctionType:
    space: dict[str, Any] = {"__name__": __name__}
    exec(f"def outer(around):\n    def inner(x=1):\n        return x + {constant}, around\n    return inner", space)
    inner: FunctionType = space["outer"](around)
    return inner


NAME = f"{__name__}.outer.<locals>.inner"
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "a number of another kind": (1, 1.0),
    "a sign": (0.0, -0.0),
    "a truth": (1, True),
    "a text": ("1", 1),
    "a list": ([1], (1,)),
    "the order of a dict": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "an item of a set": ({"a", "b"}, {"a", "c"}),
    "objects in a set": ({(1, Kind.ONE)}, {(1, Kind.OTHER)}),
    "a member": (Kind.ONE, Kind.OTHER),
    "inside an object": (Holder([1, {"a": 2}]), Holder([1, {"a": 3}])),
    "one that is nested in itself": (in_itself(1), in_itself(2)),
    "what a function holds": (made(1, min), made(1, max)),
    "code": (made(1), made(2)),
    "a class": (Holder, Kind),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_value_has_another_digest(name: str) -> None:
    one, other = DIFFERENT[name]
    followed = frozenset((NAME,))
    assert digest_of(one, followed=followed) == digest_of(one, followed=followed) != digest_of(other, followed=followed)


def test_equal_texts_count_as_one_whoever_made_them() -> None:
    shared = text("some text")
    assert digest_of({shared: [shared]}) == digest_of({text("some text"): [text("some text")]})


def test_of_methods_of_modules_that_nobody_follows_their_place_alone_counts() -> None:
    one, two = (type("Net", (nn.Module,), {"other": made(number)})() for number in (1, 2))
    assert digest_of(one) == digest_of(two)
    assert digest_of(one, followed=frozenset((NAME,))) != digest_of(two, followed=frozenset((NAME,)))
    assert digest_of(made(1)) != digest_of(made(2)), "what it computes may be remembered"


def test_a_second_launch_makes_no_table_and_one_after_a_comment_makes_it_once(launches: Launches) -> None:
    tables: list[int] = []
    usual: Callable[..., Any] = assumptions.answered

    def answered(*given: Any) -> Any:
        tables.append(1)
        return usual(*given)

    def compiled_and_tables() -> tuple[int, int]:
        tables.clear()
        return launches.launch().compiled, len(tables)

    parts = launches.folder.joinpath("parts.py").read_text(encoding="utf-8")
    launches.write(
        **{"parts.py": f"{parts}\nfrom more import helper\n", "more.py": "def helper(x):\n    return x * 2\n"}
    )
    with mock.patch.object(assumptions, "answered", answered):
        assert launches.launch().compiled == 1
        assert compiled_and_tables() == (0, 0)
        launches.edit("more.py", "* 2\n", "* 2\n# of no matter\n")
        assert [compiled_and_tables() for _ in range(2)] == [(0, 1), (0, 0)]
