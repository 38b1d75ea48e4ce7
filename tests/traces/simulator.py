"""Ranks that run their Chakra traces as ASTRA-sim lets them: each computes one thing at a time.

Beside that it runs one collective or send; receives wait beside these. Of the nodes that could run, that with the
lowest number does. Everything takes a random time, so that ranks with the same trace come to its collectives in any
order.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from tests.traces.wire import Node

PATIENCE = 100  # turns of each rank without any progress: then they wait for each other


class Simulation:
    """``groups``: name -> ranks; ``ranks``: the nodes of each."""

    def __init__(self, groups: Mapping[str, Sequence[int]], ranks: Sequence[Sequence[Node]], seed: int) -> None:
        self.groups, self.random = groups, random.Random(seed)
        self.left = [{node.id: node for node in nodes} for nodes in ranks]
        self.missing = [{node.id: len(set(node.before)) for node in nodes} for nodes in ranks]
        self.users: list[dict[int, list[int]]] = [defaultdict(list) for _ in ranks]
        for users, nodes in zip(self.users, ranks):
            for node in nodes:
                for before in set(node.before):
                    users[before].append(node.id)
        self.ready = [{number for number, count in missing.items() if not count} for missing in self.missing]
        self.running: list[dict[str, int]] = [{} for _ in ranks]  # "COMP" or "COMM" -> node
        self.receiving: list[set[int]] = [set() for _ in ranks]
        self.sent: set[tuple[int, int, int]] = set()
        self.issued: Counter[tuple[int, str]] = Counter()  # collectives of a rank in a group
        self.joined: Counter[tuple[str, int]] = Counter()  # ranks in the n-th collective of a group
        self.turn: dict[tuple[int, int], tuple[str, int]] = {}

    def ends(self) -> bool:
        """Whether all ranks come to their end."""
        idle = 0
        while any(self.left) and idle < PATIENCE * len(self.left):
            idle = 0 if self._step(self.random.randrange(len(self.left))) else idle + 1
        return not any(self.left)

    def _step(self, rank: int) -> bool:
        before = len(self.left[rank]), dict(self.running[rank]), len(self.receiving[rank])
        for slot, number in list(self.running[rank].items()):
            if self._may_end(rank, self.left[rank][number]) and self.random.random() < 0.5:
                del self.running[rank][slot]
                self._end(rank, number)
        for number in [n for n in self.receiving[rank] if self._may_end(rank, self.left[rank][n])]:
            self.receiving[rank].remove(number)
            self._end(rank, number)
        for number in sorted(self.ready[rank]):
            self._start(rank, self.left[rank][number])
        return before != (len(self.left[rank]), self.running[rank], len(self.receiving[rank]))

    def _start(self, rank: int, node: Node) -> None:
        slot, about = "COMP" if node.type == "COMP" else "COMM", node.attributes
        if node.type == "RECV":
            self.receiving[rank].add(node.id)
        elif slot in self.running[rank]:
            return
        else:
            self.running[rank][slot] = node.id
        self.ready[rank].remove(node.id)
        if node.type == "SEND":
            self.sent.add((rank, about["comm_dst"], about["comm_tag"]))
        elif node.type == "COLL":
            group = about["pg_name"]
            self.turn[rank, node.id] = group, self.issued[rank, group]
            self.issued[rank, group] += 1
            self.joined[self.turn[rank, node.id]] += 1

    def _may_end(self, rank: int, node: Node) -> bool:
        if node.type == "RECV":
            return (node.attributes["comm_src"], rank, node.attributes["comm_tag"]) in self.sent
        if node.type == "COLL":
            turn = self.turn[rank, node.id]
            return self.joined[turn] == len(self.groups[turn[0]])
        return True

    def _end(self, rank: int, number: int) -> None:
        del self.left[rank][number]
        for user in self.users[rank][number]:
            self.missing[rank][user] -= 1
            if not self.missing[rank][user]:
                self.ready[rank].add(user)
