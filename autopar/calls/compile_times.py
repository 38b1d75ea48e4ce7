"""What compiling takes, said where a script waits for it again and again."""

from __future__ import annotations

import logging

from autopar.notes import is_mute

MANY = (8, 16, 64)  # programs at which something is said
MANY_SHAPES = (
    "%d programs so far, whose sizes make no family (docs/lengths.md): %.1f s each; %d are kept\n"
    "%sWay out: pad to few lengths: pad_to_multiple_of=128 of a collator, padding='max_length' of a tokenizer; and\n"
    "drop_last=True of a DataLoader."
)

logger = logging.getLogger("autopar")


class CompileTimes:
    """The ``seconds`` that each compiled program of a module took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._told = 0  # how often it was said that there are many

    def tell_many(self, kept: int, why: str) -> None:
        """Say what many programs cost, of which ``kept`` are kept, ``why`` there are many, and how to have fewer."""
        number = len(self.seconds)
        if self._told < len(MANY) and number >= MANY[self._told] and not is_mute():
            self._told += 1
            logger.warning(MANY_SHAPES, number, sum(self.seconds) / number, kept, f"Why: {why}\n" if why else "")
