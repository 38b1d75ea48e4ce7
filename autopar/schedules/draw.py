"""A timeline in the terminal: one row per rank, a box per compute, folded to the width.

0 .. 12
rank 0  F0 F1 · · · B0    B1    · · ·
rank 1  · · F0 B0    F1 B1    · · ·
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Group
from rich.text import Text

from autopar.schedules.instructions import Kind
from autopar.schedules.timing import Event, Timeline

MOST_COLUMNS = 20_000
IDLE = "·"
COLOURS = {  # of the first stage of a rank, then of its other stages, each lighter
    Kind.F: ("#74a5e0", "#a5c6ee", "#c3daf5", "#dbe9fa"),
    Kind.B: ("#74b976", "#a4d3a5", "#c3e3c4", "#dcf0dc"),
    Kind.I: ("#56b9b5", "#93d3d0", "#b8e3e1", "#d6f0ee"),
    Kind.W: ("#e69a57", "#f0bf95", "#f6d6b9", "#fbe8d8"),
}
WORDS = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradients", Kind.W: "weight gradients"}


@dataclass(frozen=True)
class Piece:
    """The columns [start, stop) of a box that are on one band. ``label`` may be empty."""

    event: Event
    start: int
    stop: int
    label: str


@dataclass(frozen=True)
class Bands:
    """A timeline cut into bands of ``columns`` columns: ``rows[band][rank]``, pieces in the order of time."""

    columns: int
    per_second: float  # columns
    rows: tuple[tuple[tuple[Piece, ...], ...], ...]
    lengths: tuple[int, ...]  # columns of each band


def fold(timeline: Timeline, columns: int) -> Bands:
    """``timeline`` in bands of at most ``columns`` columns: box widths follow time, a typical box has room for its
    label.

    A label is on the first piece that has room for it and one free column; a box too narrow for it has no label.
    """
    events = [event for events in timeline.ranks for event in events]
    several = any(len({event.stage for event in own}) > 1 for own in timeline.ranks)
    room = max(len(label(event, several)) for event in events) + 1
    unit = _usual(events, timeline.measured)
    per_second = min(room / unit, MOST_COLUMNS / timeline.seconds)
    columns = max(room, columns // room * room)  # whole units, so that no box of one unit is divided
    spans = [_spans(own, per_second) for own in timeline.ranks]
    whole = max(1, round(timeline.seconds * per_second), *(stop for own in spans for _, stop in own))
    count = math.ceil(whole / columns)
    rows: list[list[list[Piece]]] = [[[] for _ in timeline.ranks] for _ in range(count)]
    for rank, own in enumerate(timeline.ranks):
        for event, span in zip(own, spans[rank]):
            for band, piece in _pieces(event, label(event, several), span, columns):
                rows[band][rank].append(piece)
    return Bands(
        columns,
        per_second,
        tuple(tuple(tuple(pieces) for pieces in band) for band in rows),
        tuple(min(columns, whole - band * columns) for band in range(count)),
    )


def label(event: Event, several: bool) -> str:
    """``F3``; ``F1.3``, with the stage, where a rank holds several."""
    return f"{event.kind}{event.stage}.{event.microbatch}" if several else f"{event.kind}{event.microbatch}"


def draw(timeline: Timeline, width: int) -> Group:
    """A rich renderable of at most ``width`` columns (at least about 20). Raises ValueError for an empty timeline."""
    if not any(timeline.ranks):
        raise ValueError("there is nothing to draw: no rank computes anything")
    margin = len(f"rank {len(timeline.ranks) - 1}  ")
    bands = fold(timeline, width - margin)
    shades = shades_of(timeline)
    lines = []
    for number, band in enumerate(bands.rows):
        if len(bands.rows) > 1:
            lines.append(Text(span_text(timeline, bands, number), style="dim"))
        for rank, pieces in enumerate(band):
            lines.append(_row(f"rank {rank}".ljust(margin), pieces, bands.lengths[number], shades))
    return Group(*lines, _legend(timeline))


def span_text(timeline: Timeline, bands: Bands, number: int) -> str:
    """The time span of a band: ``12 .. 24``, or ``3.1 .. 6.2 ms``."""
    start = number * bands.columns / bands.per_second
    stop = min(timeline.seconds, start + bands.columns / bands.per_second)
    if timeline.measured:
        return f"{start * 1e3:.1f} .. {stop * 1e3:.1f} ms"
    return f"{start:g} .. {stop:g}"


def shades_of(timeline: Timeline) -> dict[tuple[Kind, int], str]:
    """The colour of each kind and stage."""
    shades: dict[tuple[Kind, int], str] = {}
    for own in timeline.ranks:
        for turn, stage in enumerate(sorted({event.stage for event in own})):
            shades |= {(kind, stage): colours[min(turn, len(colours) - 1)] for kind, colours in COLOURS.items()}
    return shades


def _usual(events: Sequence[Event], measured: bool) -> float:
    """The time that gets the room of one label: the shortest compute; in a measured timeline the median."""
    times = [event.end_s - event.start_s for event in events if event.end_s > event.start_s]
    return (median(times) if measured else min(times)) if times else 1.0


def _spans(events: Sequence[Event], per_second: float) -> list[tuple[int, int]]:
    """The columns of each compute of a rank: at least one for each, so that a very short compute is visible."""
    found, free = [], 0
    for event in events:
        start = max(free, round(event.start_s * per_second))
        free = max(start + (event.end_s > event.start_s), round(event.end_s * per_second))
        found.append((start, free))
    return found


def _pieces(event: Event, text: str, span: tuple[int, int], columns: int) -> Iterator[tuple[int, Piece]]:
    start, stop = span
    while start < stop:
        band = start // columns
        end = min(stop, (band + 1) * columns)
        fits = end - start > len(text)
        yield band, Piece(event, start - band * columns, end - band * columns, text if fits else "")
        text = "" if fits else text
        start = end


def _row(head: str, pieces: Sequence[Piece], length: int, shades: dict[tuple[Kind, int], str]) -> Text:
    line = Text(head, no_wrap=True, end="\n")
    position = 0
    for piece in pieces:
        line.append(_idle(position, piece.start), style="dim")
        style = f"black on {shades[piece.event.kind, piece.event.stage]}"
        line.append(piece.label.ljust(piece.stop - piece.start), style=style)
        position = piece.stop
    line.append(_idle(position, length), style="dim")
    return line


def _idle(start: int, stop: int) -> str:
    return "".join(IDLE if column % 2 == 0 else " " for column in range(start, stop))


def _legend(timeline: Timeline) -> Text:
    line = Text()
    present = {event.kind for own in timeline.ranks for event in own}
    for kind in (kind for kind in Kind if kind in present):
        line.append(f" {kind} ", style=f"black on {COLOURS[kind][0]}")
        line.append(f" {WORDS[kind]}   ")
    line.append(f"{IDLE} ", style="dim")
    line.append("idle")
    return line
