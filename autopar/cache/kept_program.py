"""A program as an entry of the cache has it: what is needed to run it, its graphs, and the Python that ranks run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx

from autopar.cache.packing import packed_apart, packed_graphs, unpacked_apart
from autopar.errors import InvariantError
from autopar.ir.program import AnyProgram, text_digest
from autopar.plan import Plan

# what ranks run of a program, given the number of each of its graphs, and what packs other graphs; as bytes that only
# their maker reads
Write = Callable[[AnyProgram, Callable[[fx.Graph], int], Callable[[list[fx.Graph]], bytes]], bytes]


@dataclass(frozen=True)
class KeptProgram:
    """``outside``: all but the graphs. ``text``: a digest of the text form. ``code``: empty where there is none."""

    text: bytes
    outside: bytes
    graphs: bytes
    code: bytes

    @classmethod
    def of(cls, program: AnyProgram, plan: Plan, write: Write | None, *, whole: bool = False) -> KeptProgram:
        """``write``: makes the code. ``whole``: with the buffers that the model makes. Raises Unstorable."""
        outside, graphs, in_order = packed_apart(program if whole else replace(program, made_buffers={}), plan)
        number = {id(graph): place for place, graph in enumerate(in_order)}
        code = b""
        if write is not None:
            with suppress(InvariantError):  # whoever wants to run it is told
                code = write(program, lambda graph: number[id(graph)], partial(packed_graphs, plan=plan))
        return cls(text_digest(program).encode(), outside, graphs, code)

    @property
    def parts(self) -> list[bytes]:
        return [self.text, self.outside, self.graphs, self.code]

    @classmethod
    def from_parts(cls, parts: Sequence[bytes]) -> KeptProgram:
        return cls(*parts)

    def read(self, plan: Plan, *, may_run: bool) -> AnyProgram:
        """The program, for a reader with this ``plan``. ``may_run``: the code is what this user has written.

        Raises any exception where it, or later its graphs, could not be read.
        """
        found: Any = unpacked_apart(self.outside, self.graphs, plan, self.text.decode(), self.code if may_run else b"")
        program: AnyProgram = found
        return program
