"""What a run of forward leaves behind in Python, and how it is taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopar.ir.same_values import MISSING


@dataclass(frozen=True)
class Change:
    """What forward left in a namespace; ``read_first``: it looks at what the call before has left there.

    ``is_seen``: False where nobody is told of what reads and writes; then ``read_first`` is feared, not known.
    """

    label: str
    table: dict[str, Any]
    key: str
    before: Any
    now: Any
    read_first: bool
    line: str
    is_seen: bool = True

    def undo(self) -> None:
        put(self.table, self.key, self.before)


def put(table: dict[str, Any], key: str, value: Any) -> None:
    """``table[key] = value``, or no such entry."""
    if value is MISSING:
        table.pop(key, None)
    else:
        table[key] = value
