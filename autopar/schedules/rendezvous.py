"""Post receives early enough that no rank hangs where a send waits for its receiver.

    rank 0: ... SEND B2.0 -> 1  RECV B3.1 -> 2 ...         SEND B2.0 waits for RECV B2.0, SEND B3.1 for RECV B3.1
    rank 1: ... SEND B3.1 -> 2  RECV B2.0 -> 1 ...
    -->
    rank 0: ... RECV B3.1 -> 2  SEND B2.0 -> 1 ...
    rank 1: ... SEND B3.1 -> 2  RECV B2.0 -> 1 ...

autopar's sends never block. But a transport may start a large message only when there is memory for it, and a later
message of the same stream then waits too.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.schedules.instructions import Compute, Flow, Instruction, Message, Receive, Schedule, Send


def with_early_posts(schedule: Schedule, flow: Flow) -> Schedule:
    """``schedule`` with some receives earlier: those without which ranks would wait for each other in their sends.

    All ranks advance as far as they can; where none can, and a send waits for a rank that waits in a send of its own,
    the receive moves there, with those of the same channel before it. A schedule that hangs otherwise stays as it is.
    """
    walk = _Walk(schedule, flow)
    while walk.advance():
        pass
    return replace(schedule, ranks=tuple(map(tuple, walk.lists)))


class _Walk:
    def __init__(self, schedule: Schedule, flow: Flow) -> None:
        self.placement, self.flow = schedule.placement, flow
        self.lists: list[list[Instruction]] = [list(steps) for steps in schedule.ranks]
        self.at = [0] * len(self.lists)
        self.sent: set[Message] = set()
        self.posted: set[Message] = set()
        self.waiting: dict[Message, int] = {}
        self.todo = list(range(len(self.lists)))

    def advance(self) -> bool:
        """Let all ranks advance, then move one receive; False where there is none to move."""
        while self.todo:
            rank = self.todo.pop()
            steps = self.lists[rank]
            while self.at[rank] < len(steps):
                missing = self._step(rank, steps[self.at[rank]])
                if missing is not None:
                    self.waiting[missing] = rank
                    break
                self.at[rank] += 1
        for message, rank in self.waiting.items():
            receiver = self.placement[message.target]
            if self._sends(rank) and self._sends(receiver):
                return self._move(message, receiver)
        return False

    def _sends(self, rank: int) -> bool:
        """Whether ``rank`` stands at a send."""
        steps, at = self.lists[rank], self.at[rank]
        return at < len(steps) and isinstance(steps[at], Send)

    def _step(self, rank: int, step: Instruction) -> Message | None:
        """The message that ``rank`` has to wait for here: until it is sent, or until there is memory for it."""
        if isinstance(step, Compute):
            elsewhere = (m for m in self.flow.needs(step) if self.placement[m.source] != rank)
            return next((message for message in elsewhere if message not in self.sent), None)
        known = self.sent if isinstance(step, Send) else self.posted
        known.add(step.message)
        if step.message in self.waiting:
            self.todo.append(self.waiting.pop(step.message))
        return step.message if isinstance(step, Send) and step.message not in self.posted else None

    def _move(self, message: Message, receiver: int) -> bool:
        """Post ``message``, and what its sender sends to the same rank before, where the receiver stands."""
        steps, start = self.lists[receiver], self.at[receiver]
        sender, early = self.placement[message.source], list[int]()
        for position in range(start, len(steps)):
            step = steps[position]
            if isinstance(step, Receive) and self.placement[step.message.source] == sender:
                early.append(position)
                if step.message == message:
                    moved = [steps[at] for at in early]
                    rest = [steps[at] for at in range(start, position) if at not in early]
                    steps[start : position + 1] = [*moved, *rest]
                    self.todo.append(receiver)
                    self.waiting = {m: rank for m, rank in self.waiting.items() if rank != receiver}
                    return True
        return False
