"""Tables about the programs of a family, as one table in which numbers that change are expressions of the sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from autopar.families.forms import NoForm, Terms

NUMBER = re.compile(r"\d+")


def generalised(tables: Sequence[Any], terms: Terms) -> Any:
    """``tables``, equal JSON values but for numbers, one at each point; expressions are text (``"s/2"``).

    Numbers in texts count too: the layout ``f32[4@dp,16]`` becomes ``f32[b@dp,s]``. Raises NoForm.
    """
    first = tables[0]
    if all(table == first for table in tables):
        return first
    kinds = {type(table) for table in tables}
    if kinds == {dict} and all(table.keys() == first.keys() for table in tables):
        return {key: generalised([table[key] for table in tables], terms) for key in first}
    if kinds == {list} and len({len(table) for table in tables}) == 1:
        return [generalised(items, terms) for items in zip(*tables)]
    if kinds == {int}:
        return str(terms.form(tuple(tables)))
    if kinds == {str} and len({NUMBER.sub("", table) for table in tables}) == 1:
        found = [[int(number) for number in NUMBER.findall(table)] for table in tables]
        numbers = iter([terms.form(items) for items in zip(*found)])
        return NUMBER.sub(lambda _: str(next(numbers)), first)
    raise NoForm(f"{first!r} is something else at other sizes")
