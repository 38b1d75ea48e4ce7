"""Pictures of a timeline: every compute is on them, at its time, and every text fits its box."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from rich.console import Console

from autopar.schedules.draw import COLOURS, Bands, draw, fold
from autopar.schedules.instructions import Kind
from autopar.schedules.named import NAMES, make_schedule
from autopar.schedules.svg import svg
from autopar.schedules.timing import Event, Timeline, timeline

LETTER = 0.6021  # of DejaVu Sans Mono, in its size
SVG = "{http://www.w3.org/2000/svg}"


def printed(line: Timeline, width: int) -> list[str]:
    console = Console(width=width, highlight=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(draw(line, width))
    return console.export_text().splitlines()


def measured(seconds: float = 1e-3) -> Timeline:
    """Two ranks whose computes take unequal times; one of them hardly any."""
    starts: Sequence[tuple[int, Kind, int, float, float]] = [
        (0, Kind.F, 0, 0.0, 1.0),
        (0, Kind.F, 1, 1.2, 2.2),
        (0, Kind.B, 0, 5.0, 7.3),
        (0, Kind.B, 1, 7.3, 7.31),
        (1, Kind.F, 0, 1.5, 2.4),
        (1, Kind.B, 0, 2.4, 4.9),
    ]
    return Timeline.of_events(Event(r, k, r, i, 100 + a * seconds, 100 + b * seconds) for r, k, i, a, b in starts)


def test_1f1b_in_the_terminal() -> None:
    lines = printed(timeline(make_schedule("1f1b", 2, 3)), 60)
    assert lines == [
        "rank 0  F0 F1 · · · B0    F2 B1     · B2    ",
        "rank 1  · ·F0 B0    F1 B1    F2 B2    · · · ",
        " F  forward    B  backward   · idle",
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [30, 80, 110])
def test_every_compute_is_drawn_once_and_no_line_is_too_long(name: str, width: int) -> None:
    made = make_schedule(name, 3, 12)
    lines = printed(timeline(made), width)
    several = len(made.placement) > 3
    for rank in range(3):
        row = " ".join(line for line in lines if line.startswith(f"rank {rank}"))
        found = re.findall(r"[FBIW][\d.]+", row)
        steps = list(made.computes(rank))
        assert found == [str(s) if several else f"{s.kind}{s.microbatch}" for s in steps]
    assert max(len(line) for line in lines if line.startswith("rank")) <= width


def test_bands_hold_the_whole_time() -> None:
    line = timeline(make_schedule("gpipe", 4, 16))
    bands = fold(line, 40)
    assert len(bands.rows) == len(bands.lengths) > 3
    assert sum(bands.lengths) == round(line.seconds * bands.per_second)
    for rank, events in enumerate(line.ranks):
        pieces = [(band, piece) for band, rows in enumerate(bands.rows) for piece in rows[rank]]
        drawn = sum(piece.stop - piece.start for _, piece in pieces)
        assert drawn == round(sum(e.end_s - e.start_s for e in events) * bands.per_second)
        assert in_order(bands, rank)


def in_order(bands: Bands, rank: int) -> bool:
    return all(
        0 <= piece.start < piece.stop <= length and (not before or before[-1].stop <= piece.start)
        for band, length in zip(bands.rows, bands.lengths)
        for before, piece in ((band[rank][:i], piece) for i, piece in enumerate(band[rank]))
    )


def test_measured_times_are_in_milliseconds_and_too_narrow_boxes_have_no_text() -> None:
    lines = printed(measured(), 25)
    assert lines[0] == "0.0 .. 5.0 ms"
    row = " ".join(line for line in lines if line.startswith("rank 0"))
    assert re.findall(r"[FB]\d", row) == ["F0", "F1", "B0"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [40, 150])
def test_svg_texts_fit(name: str, columns: int) -> None:
    line = timeline(make_schedule(name, 4, 12))
    check_picture(svg(line, f"{name}: 4 ranks", columns), sum(map(len, line.ranks)))


def test_svg_of_a_measured_run() -> None:
    picture = svg(measured(), "a < b & c")
    check_picture(picture, 5)
    assert "a &lt; b &amp; c" in picture and "F0.1 on rank 0: 1.200 .. 2.200 ms" in picture


def check_picture(picture: str, boxes: int) -> None:
    """Boxes lie in the picture and do not overlap; a text in the middle of a box lies in that box, others in the
    picture; no two rows of text meet."""
    root = ElementTree.fromstring(picture)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    size = float(root.attrib["font-size"])
    rects = [e for e in root.iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]
    assert len(rects) >= boxes
    spans = sorted((float(r.attrib["y"]), float(r.attrib["x"]), float(r.attrib["width"])) for r in rects)
    for (y, x, w), (next_y, next_x, _) in zip(spans, spans[1:]):
        assert y != next_y or x + w <= next_x + 1e-6
        assert x + w <= width
    colours = {colour for shades in COLOURS.values() for colour in shades}
    assert {r.attrib["fill"] for r in rects} <= colours
    labels = 0
    for text in root.iter(f"{SVG}text"):
        x, y, long = float(text.attrib["x"]), float(text.attrib["y"]), len(text.text or "") * size * LETTER
        assert y <= height
        if text.attrib.get("text-anchor") != "middle":
            assert x + long <= width, text.text
            continue
        (box,) = (r for r in rects if lies_in(x, y, r))
        left, wide = float(box.attrib["x"]), float(box.attrib["width"])
        assert left <= x - long / 2 and x + long / 2 <= left + wide, text.text
        labels += 1
    assert labels == boxes


def lies_in(x: float, y: float, rect: ElementTree.Element) -> bool:
    left, top, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
    return left < x < left + width and top < y < top + height


def test_nothing_to_draw() -> None:
    for draw_it in (lambda line: draw(line, 80), lambda line: svg(line, "")):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw_it(Timeline(((), ())))
