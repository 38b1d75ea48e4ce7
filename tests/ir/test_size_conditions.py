"""Conditions on sizes: values, words, and what a file may say."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.ir.size_conditions import Condition

LONG = ("gt", ("floordiv", ("add", "s", 7), 8), 4)
CASES: list[tuple[Any, str, list[int], list[int]]] = [  # tree, words, values of s for which it holds, and does not
    (("ne", ("mod", "s", 3), 0), "s % 3 != 0", [1, 2, 4], [3, 6]),
    (LONG, "(s + 7)//8 > 4", [33, 34], [32, 8]),
    (("and", ("gt", "s", 60), ("lt", "s", 100)), "(s > 60) and (s < 100)", [61, 99], [60, 100]),
    (("not", ("le", ("truediv", "s", 10), 4.5)), "not (s/10 <= 4.5)", [46], [45]),
    (("eq", ("bitand", "s", ("add", -1, "s")), 0), "s & (-1 + s) == 0", [1, 2, 64], [3, 48]),
    (("lt", ("max", "s", ("mul", 2, "s")), 10), "max(s, 2*s) < 10", [4], [5]),
    (("ge", ("floor", ("sqrt", "s")), 3), "floor(sqrt(s)) >= 3", [9, 10], [8]),
    (("lt", ("truediv", 8, ("add", "s", -4)), 2), "8/(s + -4) < 2", [1, 9], [4, 5]),  # 4 divides by nothing
]


@pytest.mark.parametrize(("tree", "words", "yes", "no"), CASES)
def test_values_words_and_files(tree: Any, words: str, yes: list[int], no: list[int]) -> None:
    condition = Condition(tree)
    assert str(condition) == words and condition.names == {"s"}
    assert all(condition.holds({"s": value}) for value in yes)
    assert not any(condition.holds({"s": value}) for value in no)
    assert Condition.of_json(condition.as_json(), ["s"]) == condition


def test_what_is_left_out() -> None:
    condition = Condition(("gt", ("mul", "b", "s"), 40))
    assert condition.excludes({"b": range(4, 8, 2), "s": range(3, 64)})
    assert not condition.excludes({"b": range(4, 8, 2), "s": range(16, 64)})


FILES = [
    ["add", "s", 1],  # no condition
    "s",
    ["lt", "s", "b"],  # b is no size here
    ["lt", "s"],
    ["__import__", "s", "s"],
    ["lt", "s", True],
    ["lt", "s", 1 << 70],
    ["lt", "s", ["add", *[1] * 300]],
]


@pytest.mark.parametrize("data", FILES)
def test_a_file_says_nothing_else(data: Any) -> None:
    with pytest.raises(ValueError, match="condition"):
        Condition.of_json(data, ["s"])
