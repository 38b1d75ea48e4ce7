"""What ranks sent between two looks at their counters."""

from __future__ import annotations

from collections.abc import Iterable

from autopar.ir.traffic import Transfer


def sent_since(before: Iterable[Transfer], now: Iterable[Transfer]) -> list[Transfer]:
    """The transfers of ``now`` without those that ``before`` counts already."""
    known = {(entry.phase, entry.axis, entry.name): entry for entry in before}
    found = []
    for entry in now:
        old = known.get((entry.phase, entry.axis, entry.name), Transfer(entry.phase, entry.axis, entry.name, 0, 0))
        if entry != old:
            counts = entry.operations - old.operations, entry.bytes - old.bytes
            found.append(Transfer(entry.phase, entry.axis, entry.name, *counts))
    return found
