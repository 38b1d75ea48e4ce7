"""What the ranks of a mesh tell each other before they compute: that they are about to do the same.

A rank that does something else (another shape, another plan, its own weights) would leave the others waiting in a
collective that it never joins, or let them sum what does not belong together. So each call starts with a few bytes in
a process group of their own, on the CPU, while the rank goes on to its first collective; there it waits for the answer.
Where the answers differ, all ranks know it at the same time, and each says which ranks did what.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from autopar.communication.functional_collectives import start_maximum
from autopar.errors import InvariantError, RankFailedError, RanksDifferError

BITS = 62  # of a digest: its negative is an int64 too
SHOWN, WIDTH = 6, 160
SAME_CALLS = (
    "every rank makes the same calls, with inputs of the same shapes and types: pad or drop the rows that are left "
    "over at the end of the data (drop_last=True), and evaluate on all ranks, not only on rank 0."
)
Failed = Callable[[str, Exception], RankFailedError]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def digest_of(thing: Hashable) -> int:
    """A number that is equal for things that print alike, in every process; addresses of objects do not count."""
    text = _ADDRESS.sub("", repr(thing))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - BITS)


class Said(str):
    """What a rank says that it does, with ``rows`` that may be others on other ranks where all say the same ``rest``.

    ``rest`` is None where nothing may differ.
    """

    rest: int | None
    rows: tuple[int, ...]

    def __new__(cls, text: str, rest: int | None = None, rows: tuple[int, ...] = ()) -> Said:
        made = super().__new__(cls, text)
        made.rest, made.rows = rest, rows
        return made

    def __reduce__(self) -> tuple[type[Said], tuple[str, int | None, tuple[int, ...]]]:
        return Said, (str(self), self.rest, self.rows)


class UnequalRows(Exception):
    """All ranks make the same call, with other numbers of rows: for each rank those of its inputs."""

    def __init__(self, rows: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.rows = list(rows)

    @classmethod
    def check(cls, everyone: Sequence[Any]) -> None:
        """Raise one where nothing but rows differs in what ``everyone`` said."""
        things = [thing[0] if isinstance(thing, tuple) else thing for thing in everyone]
        known = [thing for thing in things if isinstance(thing, Said) and thing.rest is not None]
        alike = len(known) == len(everyone) and len({thing.rest for thing in known}) == 1
        if alike and len({thing.rows for thing in known}) > 1:
            raise cls([thing.rows for thing in known])


class Agreement:
    """The agreement of the ranks of one mesh; without a ``group`` there is one rank, which agrees with itself.

    ``failed`` makes the error for a wait (first argument) that a peer never joined.
    """

    def __init__(self, group: ProcessGroup | None, failed: Failed) -> None:
        self._group, self._failed = group, failed
        self._started: tuple[Tensor, dist.Work, Callable[[], str], str] | None = None
        self.noted = False  # whether a ``note`` was given to :meth:`start`, on any rank, so far
        self.times_noted = 0  # how often one above 1 was

    @property
    def is_open(self) -> bool:
        """Whether this rank has said what it is about to do, and not yet heard the others."""
        return self._started is not None

    def start(self, digest: int, describe: Callable[[], str], way_out: str, note: int = 0) -> None:
        """Say what this rank does next, by its ``digest``; all ranks do this at the same time.

        ``describe`` and ``way_out`` are for the message of :meth:`settle`. All ranks have :attr:`noted` what one notes.
        """
        if self._group is None:
            return
        self.settle()
        both = torch.tensor((digest, -digest, note))
        self._started = both, start_maximum(both, self._group), describe, way_out

    def agrees(self) -> bool:
        """Wait for the others: whether all of them said the same as this rank."""
        if self._started is None:
            return True
        both, work, *_ = self._started
        self._started = None
        self._finish(work, "comparing what the ranks do next")
        highest, lowest, noted = both.tolist()
        self.noted |= bool(noted)
        self.times_noted += noted > 1
        return bool(highest == -lowest)

    def settle(self) -> None:
        """Wait for the others. Raises RanksDifferError where not all of them said the same, UnequalRows."""
        started = self._started
        if started is not None and not self.agrees():
            *_, describe, way_out = started
            everyone = self.everyone(describe())
            UnequalRows.check(everyone)
            text = told(everyone)
            raise RanksDifferError(f"the ranks do not do the same:\n{text}\nWay out: {way_out}")

    def everyone(self, mine: Any) -> list[Any]:
        """The objects of all ranks, in their order; collective."""
        if self._group is None:
            return [mine]
        found: list[Any] = [None] * self._group.size()
        try:
            dist.all_gather_object(found, mine, group=self._group)
        except RuntimeError as problem:
            raise self._failed("comparing what the ranks do next", problem) from None
        return found

    def differing(self, numbers: Tensor) -> list[int]:
        """The positions of whole ``numbers`` (of up to 62 bits) at which not all ranks have the same; collective."""
        highest = torch.stack((numbers, -numbers))
        self.reduce(highest)
        return (highest[0] != -highest[1]).nonzero().flatten().tolist()

    def reduce(self, numbers: Tensor) -> None:
        """The largest of each of ``numbers`` over all ranks, in place; collective."""
        if self._group is None:
            return
        self.settle()
        self._finish(start_maximum(numbers, self._group), "comparing what the ranks have")

    def _finish(self, work: dist.Work, what: str) -> None:
        try:
            work.wait()
        except RuntimeError as problem:
            raise self._failed(what, problem) from None

    def compare(self, facts: Mapping[str, str], way_out: str) -> None:
        """Raise RanksDifferError unless all ranks have the same ``facts`` by name; collective.

        The names may differ too. The message has those facts that do.
        """
        if self._group is None:
            return
        self.start(digest_of(tuple(facts.items())), str, way_out)
        if not self.agrees():
            raise RanksDifferError(f"the ranks differ:\n{differences(self.everyone(dict(facts)))}\nWay out: {way_out}")


def told(everyone: Sequence[Any]) -> str:
    """What each rank said: one line for each thing that was said, that of most ranks first."""
    said: dict[str, list[int]] = {}
    for rank, thing in enumerate(everyone):
        text = thing if isinstance(thing, str) else thing[0] if isinstance(thing, tuple) else "the start of a module"
        said.setdefault(text[:WIDTH], []).append(rank)
    lines = sorted(said.items(), key=lambda item: (-len(item[1]), item[1]))
    shown = [f"  {ranks_text(ranks)}: {text}" for text, ranks in lines[:SHOWN]]
    return "\n".join(shown + ["  and others"] * (len(lines) > SHOWN))


def differences(everyone: Sequence[Any]) -> str:
    """Of the facts by name that each rank has, those in which ranks differ, with who has which."""
    if not all(isinstance(facts, Mapping) for facts in everyone):
        return told(everyone)
    known: Sequence[Mapping[str, str]] = everyone
    names = dict.fromkeys(name for facts in known for name in facts)
    differing = [name for name in names if len({facts.get(name) for facts in known}) > 1]
    lines = []
    for name in differing[:SHOWN]:
        held: dict[str, list[int]] = {}
        for rank, facts in enumerate(known):
            held.setdefault(str(facts.get(name, "missing"))[:WIDTH], []).append(rank)
        lines.append(f"  {name}: " + ", ".join(f"{text} on {ranks_text(ranks)}" for text, ranks in held.items()))
    if len(differing) > SHOWN:
        lines.append(f"  and {len(differing) - SHOWN} others")
    return "\n".join(lines)


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 2``, of many ``ranks 8 to 15`` or ``ranks 0, 2, 4, 6, 8, 10 and 9 others``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > SHOWN and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    more = f" and {len(ranks) - SHOWN} others" if len(ranks) > SHOWN else ""
    return f"ranks {', '.join(map(str, ranks[:SHOWN]))}{more}"


def agree(agreement: Agreement, check: Callable[[], None]) -> None:
    """Raise what ``check`` raises, on this rank or on others: before the first message, which would stay under way.

    Raises InvariantError, RanksDifferError.
    """
    refusal = None
    try:
        check()
    except InvariantError as problem:
        refusal = problem
    what = "a backward pass" if refusal is None else str(refusal).partition("\n")[0]
    agreement.start(digest_of(refusal is None), lambda: what, "the error of the rank that refuses has one")
    agreement.settle()
    if refusal is not None:
        raise refusal
