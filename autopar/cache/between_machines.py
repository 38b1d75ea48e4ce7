"""One process of a launch compiles a program, and the machines that have other folders get it through its store.

On each machine the process whose turn it is (:mod:`autopar.cache.once`) comes here. The first of the launch compiles
and gives the entry, or says that there is none; the others wait for that, and compile themselves where it does not come
or does not serve. Nobody waits for a machine that has the program already: it never comes here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from autopar.cache.folder import joined_parts, split_parts
from autopar.cache.launch_store import launch_store
from autopar.cache.once import NOTICE

PIECE = 1 << 22  # bytes of one value in the store, which takes 8 MiB

logger = logging.getLogger("autopar")


class Delivery:
    """The way of the entry of ``key`` from the one process that compiles it to the others.

    Attributes:
        is_mine: whether this process is that one.
    """

    def __init__(self, key: str, store: Any = None) -> None:
        self._key, self._store, self.is_mine = key, store if store is not None else launch_store(), True
        if self._store is not None:
            try:
                self.is_mine = self._store.add(f"{key} asked for", 1) == 1
            except RuntimeError as problem:
                self._gone(problem)

    def give(self, parts: Sequence[bytes]) -> None:
        """Tell the others the parts of the entry; none at all if there is no entry."""
        if self._store is None or not self.is_mine:
            return
        content = joined_parts(parts)
        pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
        try:
            for number, piece in enumerate(pieces):
                self._store.set(f"{self._key} piece {number}", piece)
            self._store.set(f"{self._key} pieces", str(len(pieces)))
        except RuntimeError as problem:
            self._gone(problem)

    def taken(self, longest: float) -> list[bytes]:
        """The parts of the entry, waited for at most ``longest`` seconds; none at all if there is no entry."""
        if self._store is None or self.is_mine:
            return []
        try:
            if not self._comes_within(min(NOTICE, longest)):
                logger.info("waiting for another machine, which compiles the same program")
                self._store.wait([f"{self._key} pieces"], timedelta(seconds=max(0.001, longest - NOTICE)))
            count = int(self._store.get(f"{self._key} pieces"))
            content = b"".join(self._store.get(f"{self._key} piece {number}") for number in range(count))
        except RuntimeError as problem:
            self._gone(problem)
            return []
        return split_parts(content)

    def _comes_within(self, seconds: float) -> bool:
        try:
            self._store.wait([f"{self._key} pieces"], timedelta(seconds=max(0.001, seconds)))
        except RuntimeError:
            return False
        return True

    def _gone(self, problem: RuntimeError) -> None:
        logger.debug("compiling without the other machines: %s", problem)
        self._store, self.is_mine = None, True
