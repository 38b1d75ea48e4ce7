"""Let every rank of a schedule advance as far as it can: an order of all instructions, or who waits for whom for ever.

This is a search for a cycle in the graph of program order and messages, from the ready end (Kahn 1962). A compute
needs its messages. A message from another rank is available once its send has been reached. Messages between two ranks
arrive in the order of the program that sends them, so arrival adds nothing to the program order of the sender.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.schedules.instructions import Compute, Flow, Instruction, Message, Receive, Schedule

Order = list[tuple[int, Instruction]]  # rank and instruction
Stuck = dict[int, tuple[Compute, Message]]  # rank -> the compute at which it stops, and a message that it misses


def walk(schedule: Schedule, flows: Sequence[Flow]) -> tuple[Order, Stuck]:
    """All instructions that are reached, each after what it needs, and the ranks that stop early (none if all is well).

    ``flows``: one per rank. In a schedule without messages, each compute sends its results at once.
    """
    placement, at_once = schedule.placement, not schedule.has_messages
    position = [0] * len(schedule.ranks)
    made: set[Message] = set()
    waiting: dict[Message, int] = {}
    order: Order = []
    todo = list(range(len(schedule.ranks)))[::-1]
    while todo:
        rank = todo.pop()
        steps = schedule.ranks[rank]
        while position[rank] < len(steps):
            step = steps[position[rank]]
            out: list[Message] = []
            if isinstance(step, Compute):
                missing = next((message for message in flows[rank].needs(step) if message not in made), None)
                if missing is not None:
                    waiting[missing] = rank
                    break
                out = [m for m in flows[rank].makes(step) if at_once or placement[m.target] == rank]
            elif not isinstance(step, Receive):
                out = [step.message]
            order.append((rank, step))
            position[rank] += 1
            for message in out:
                made.add(message)
                if message in waiting:
                    todo.append(waiting.pop(message))
    stuck: Stuck = {}
    for message, rank in waiting.items():
        step = schedule.ranks[rank][position[rank]]
        assert isinstance(step, Compute)
        stuck[rank] = (step, message)
    return order, stuck
