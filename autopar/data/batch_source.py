"""What a training loop reads: batches by their numbers, and the place of a run among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from autopar.data.parts import Share

Batch = dict[str, Any] | tuple[Any, ...]  # what model(**batch), or model(*batch), takes


class Counts(NamedTuple):
    """Of a whole batch; ``tokens`` is None where nothing says what a token is."""

    rows: int
    tokens: int | None


class Source(Protocol):
    """Batches 0, 1, 2, ... of a run, each asked for once and in its turn, or a share of them."""

    def __call__(self, number: int, share: Share | None = None, /) -> Batch:
        """The batch, or the part of it that a rank passes. Raises ValueError where it cannot be read."""

    def first(self, share: Share | None = None) -> Batch:
        """The first batch, before it is its turn."""

    def once(self, most: int | None, share: Share | None = None) -> Iterator[Batch]:
        """All batches from the beginning, at most so many, for an evaluation. Raises ValueError where there is none."""

    def counts(self, batch: Batch) -> Counts:
        """Of the whole batch of which ``batch`` is what this rank passes."""

    def place(self, batches: int) -> dict[str, Any]:
        """The position of a run after so many batches, for its checkpoints."""

    def batches_before(self, place: Any) -> int:
        """Go on after the batches that were read when ``place`` was saved; gives their number. Raises ValueError."""
