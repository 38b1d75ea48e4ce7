"""The programs of one kind of call that differ by what the model's forward reads of Python (an attribute, a global)."""

from __future__ import annotations

from collections.abc import Hashable

from autopar.ir.guards import Guards


class Variants:
    """Which of them a call takes: the one whose guards hold now, the latest first."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[int, Guards]]] = {}
        self._made: dict[Hashable, int] = {}

    def next(self, kind: Hashable) -> int:
        """The number of a variant that is to be made."""
        return self._made.get(kind, 0)

    def number(self, kind: Hashable) -> int | None:
        """That of the variant for a call of this kind; None where no guards hold."""
        known = self._known.get(kind, ())
        for place, (number, guards) in enumerate(known):
            if guards.hold():
                if place:
                    self._known[kind] = [known[place], *known[:place], *known[place + 1 :]]
                if guards.effects:
                    guards.replay()
                return number
        return None

    def add(self, kind: Hashable, number: int, guards: Guards) -> None:
        """A variant was made, as the model is now."""
        guards.settle()
        self._known.setdefault(kind, []).insert(0, (number, guards))
        self._made[kind] = number + 1
        guards.replay()

    def remove(self, kind: Hashable, number: int) -> None:
        """Forget a variant."""
        self._known[kind] = [pair for pair in self._known.get(kind, ()) if pair[0] != number]

    def change(self, kind: Hashable) -> str:
        """What has changed since the latest variant, in words; empty if nothing, or if there is none."""
        known = self._known.get(kind)
        return known[0][1].change() if known else ""

    def clear(self) -> None:
        self._known.clear()
        self._made.clear()
