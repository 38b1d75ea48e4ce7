"""Values as people write them on a command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def key_and_value(option: str, text: str) -> tuple[str, str]:
    """``layers=4`` as ``("layers", "4")``. Raises ValueError for another form."""
    key, equals, found = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{option} {text}: it is not of the form key=value\nWay out: {option} layers=4, for example.")
    return key, found


def literal(text: str) -> Any:
    """A number, true, false or none; else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def pairs(option: str, texts: Iterable[str] | None) -> dict[str, Any]:
    """``["layers=4", "tied=false"]`` as ``{"layers": 4, "tied": False}``. Raises ValueError."""
    return {key: literal(found) for key, found in (key_and_value(option, text) for text in texts or ())}
