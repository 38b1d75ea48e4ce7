"""A schedule as text, and back.

    schedule 1f1b microbatches=2 placement=0,1
    rank 0: F0.0 SEND F0.0 -> 1 RECV B1.0 -> 0 F0.1 SEND F0.1 -> 1 RECV B1.1 -> 0 B0.0 B0.1
    rank 1: RECV F0.0 -> 1 F1.0 RECV F0.1 -> 1 B1.0 SEND B1.0 -> 0 F1.1 B1.1 SEND B1.1 -> 0

``F0.3`` is the forward of stage 0 on microbatch 3; ``B`` a whole backward, ``I`` its gradients of the inputs, ``W``
those of the weights. Instructions may continue on the next lines; a ``#`` starts a comment. A user may leave out the
first line where the computes determine it, and all sends and receives: :func:`autopar.schedules.with_messages` inserts
those.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from autopar.errors import ScheduleError
from autopar.schedules.instructions import Compute, Instruction, Kind, Receive, Schedule, Send

WIDTH = 110
HEAD = re.compile(r"rank\s+(\d+)\s*:")
NAME = re.compile(r"([FBIW])(\d+)\.(\d+)")
FORMS = "F0.3, B0.3, I0.3, W0.3, SEND F0.3 -> 1 or RECV F0.3 -> 1"


@dataclass(frozen=True)
class Word:
    text: str
    line: int


@dataclass
class Reading:
    """The part of a text that has been read so far. ``heads``: the line on which each rank starts."""

    name: str = "custom"
    microbatches: int | None = None
    placement: tuple[int, ...] | None = None
    heads: dict[int, int] = field(default_factory=dict)
    words: dict[int, list[Word]] = field(default_factory=dict)


def format_schedule(schedule: Schedule, width: int = WIDTH) -> str:
    """Deterministic text, lines of at most about ``width`` characters; :func:`parse_schedule` reads it back."""
    placement = ",".join(map(str, schedule.placement))
    lines = [f"schedule {schedule.name} microbatches={schedule.microbatches} placement={placement}"]
    for rank, steps in enumerate(schedule.ranks):
        line = f"rank {rank}:"
        indent = " " * len(line)
        for word in map(str, steps):
            if len(line) + 1 + len(word) > width and line.strip():
                lines.append(line)
                line = indent
            line += f" {word}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def parse_schedule(text: str) -> Schedule:
    """The schedule of ``text``, with or without messages. Raises ScheduleError, which names the line and the word.

    Only the form is checked; ``check_schedule`` does the rest.
    """
    reading = Reading()
    rank = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if line.startswith("schedule ") and rank is None:
            _read_header(line, number, reading)
            continue
        head = HEAD.match(line)
        if head is not None:
            rank = int(head[1])
            if rank in reading.heads:
                raise ScheduleError(f"line {number}: rank {rank} starts twice, on line {reading.heads[rank]} already")
            reading.heads[rank], reading.words[rank] = number, []
            line = line[head.end() :]
        elif rank is None and line:
            raise ScheduleError(
                f"line {number}, '{line.split()[0]}': instructions start with 'rank 0:'\n"
                "Way out: lines as rank 0: F0.0 B0.0"
            )
        if rank is not None:
            reading.words[rank] += [Word(word, number) for word in line.split()]
    return _finished(reading)


def _read_header(line: str, number: int, reading: Reading) -> None:
    name, *pairs = line.split()[1:]
    reading.name = name
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key == "microbatches" and value.isdigit():
            reading.microbatches = int(value)
        elif key == "placement" and all(part.isdigit() for part in value.split(",")):
            reading.placement = tuple(map(int, value.split(",")))
        else:
            raise ScheduleError(
                f"line {number}, '{pair}': the first line is schedule NAME microbatches=4 placement=0,1,1,0 "
                "(the rank of each stage)"
            )


def _finished(reading: Reading) -> Schedule:
    if not reading.heads:
        raise ScheduleError("the text has no line that starts with 'rank 0:'")
    missing = _first_missing(reading.heads)
    if missing < len(reading.heads):
        raise ScheduleError(f"there are lines for rank {max(reading.heads)}, and none for rank {missing}")
    ranks = [list(_instructions(reading.words[rank])) for rank in range(len(reading.heads))]
    computes = [
        (rank, step, line) for rank, steps in enumerate(ranks) for step, line in steps if isinstance(step, Compute)
    ]
    if not computes:
        raise ScheduleError("the text has no computes, like F0.0")
    microbatches = reading.microbatches
    if microbatches is None:
        microbatches = 1 + max(step.microbatch for _, step, _ in computes)
    placement = reading.placement if reading.placement is not None else _placement(computes)
    return Schedule(reading.name, placement, microbatches, tuple(tuple(step for step, _ in steps) for steps in ranks))


def _placement(computes: Sequence[tuple[int, Compute, int]]) -> tuple[int, ...]:
    """The rank of each stage: the rank that computes it."""
    homes: dict[int, tuple[int, int]] = {}
    for rank, step, line in computes:
        home, there = homes.setdefault(step.stage, (rank, line))
        if home != rank:
            raise ScheduleError(
                f"line {line}, '{step}': stage {step.stage} is computed on rank {home} too (line {there}); a stage "
                "lies on one rank"
            )
    missing = _first_missing(homes)
    if missing < len(homes):
        raise ScheduleError(f"stage {max(homes)} is computed, and stage {missing} is not")
    return tuple(homes[stage][0] for stage in range(len(homes)))


def _first_missing(numbers: Container[int]) -> int:
    """The first whole number that is not among ``numbers``."""
    return next(number for number in count() if number not in numbers)


def _instructions(words: Sequence[Word]) -> Iterator[tuple[Instruction, int]]:
    """Each instruction with the number of its line."""
    position = 0
    while position < len(words):
        word = words[position]
        if word.text in ("SEND", "RECV"):
            yield _message(words[position : position + 4]), word.line
            position += 4
        else:
            name = NAME.fullmatch(word.text)
            if name is None:
                raise ScheduleError(f"line {word.line}, '{word.text}': no instruction; there are {FORMS}")
            yield Compute(Kind(name[1]), int(name[2]), int(name[3])), word.line
            position += 1


def _message(words: Sequence[Word]) -> Instruction:
    """The instruction ``SEND F0.3 -> 1`` or ``RECV F0.3 -> 1``, given as four words."""
    texts = [word.text for word in words]
    name = NAME.fullmatch(texts[1]) if len(texts) == 4 else None
    if name is None or name[1] not in "FB" or texts[2] != "->" or not texts[3].isdigit():
        raise ScheduleError(
            f"line {words[0].line}, '{' '.join(texts)}': a message is {texts[0]} F0.3 -> 1 or {texts[0]} B1.3 -> 0 "
            "(what a stage makes, and the stage that uses it)"
        )
    kind, source, microbatch, target = Kind(name[1]), int(name[2]), int(name[3]), int(texts[3])
    if texts[0] == "SEND":
        return Send(kind, source, microbatch, target)
    return Receive(kind, target, microbatch, source)
