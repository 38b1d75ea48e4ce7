"""The bytes that one rank holds, by what they are for, as storages come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from autopar.ir.node import Node

# what the bytes of a storage are for; an account counts them by their position here
KINDS = ("parameters", "gathered", "buffers", "inputs", "activations", "working", "gradients", "in_flight")
PARAMETERS, GATHERED, BUFFERS, INPUTS, ACTIVATIONS, WORKING, GRADIENTS, IN_FLIGHT = range(len(KINDS))

Share = tuple[int, int]  # position of a kind, bytes


@dataclass
class Account:
    """Distinct storages, by number, with how often each is held.

    A storage counts once while it is held at all, as in :class:`autopar.simulator.lockstep.Memory`. ``live`` has the
    bytes of each kind; ``at_most`` the same when the sum was largest, at ``where``, in the run called ``phase``.
    """

    live: list[int] = field(default_factory=lambda: [0] * len(KINDS))
    total: int = 0
    most: int = 0
    at_most: tuple[int, ...] = (0,) * len(KINDS)
    where: Node | None = None
    phase: str = ""
    most_phase: str = ""
    most_of: list[int] = field(default_factory=lambda: [0] * len(KINDS))  # of each kind, at any time
    marks: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # what is held after a run
    _shares: list[tuple[Share, ...]] = field(default_factory=list)
    _users: list[int] = field(default_factory=list)

    def new(self, *shares: Share) -> int:
        """The number of a new storage, which nobody holds yet."""
        self._shares.append(shares)
        self._users.append(0)
        return len(self._users) - 1

    def kind(self, storage: int) -> int:
        return self._shares[storage][0][0]

    def hold(self, storages: Iterable[int], node: Node | None = None) -> None:
        for storage in storages:
            self._users[storage] += 1
            if self._users[storage] == 1:
                for kind, size in self._shares[storage]:
                    self.total += size
                    self._add(kind, size)
        if self.total > self.most:
            self.most, self.at_most, self.where, self.most_phase = self.total, tuple(self.live), node, self.phase

    def release(self, storages: Iterable[int]) -> None:
        for storage in storages:
            self._users[storage] -= 1
            if not self._users[storage]:
                for kind, size in self._shares[storage]:
                    self.live[kind] -= size
                    self.total -= size

    def settle(self, storage: int, kind: int) -> None:
        """A storage that was in flight has arrived: from now on it is of ``kind``."""
        ((before, size),) = self._shares[storage]
        self._shares[storage] = ((kind, size),)
        if self._users[storage]:
            self.live[before] -= size
            self._add(kind, size)

    def mark(self) -> None:
        """Note what is held after a run."""
        self.marks.append((self.phase, tuple(self.live)))

    def _add(self, kind: int, size: int) -> None:
        self.live[kind] += size
        self.most_of[kind] = max(self.most_of[kind], self.live[kind])
