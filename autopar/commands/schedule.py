"""``autopar schedule``: a pipeline schedule as a picture, with its bubble and memory; checked before it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from autopar.commands.options import Json
from autopar.commands.tables import print_json, stdout
from autopar.schedules.check import check_computes, check_schedule
from autopar.schedules.draw import draw
from autopar.schedules.instructions import Link, Schedule, chain
from autopar.schedules.messages import with_messages
from autopar.schedules.named import NAMES, make_schedule
from autopar.schedules.svg import svg
from autopar.schedules.text import format_schedule, parse_schedule
from autopar.schedules.timing import Timeline, peak_in_flight, timeline


@dataclass(frozen=True)
class Shown:
    """A checked schedule with its figures.

    ``formula``: the bubble of a schedule that is made by name, as text, and its value where there are enough
    microbatches.
    """

    schedule: Schedule
    drawn: Timeline
    peaks: tuple[int, ...]
    formula: tuple[str, float | None] | None
    check_s: float


def schedule_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"{', '.join(NAMES)}; or a file with a schedule as text")],
    stages: Annotated[int | None, typer.Option("--stages", min=1, help="pipeline ranks, p")] = None,
    microbatches: Annotated[int | None, typer.Option("--microbatches", min=1, help="m; default: 2 p")] = None,
    virtual: Annotated[int | None, typer.Option("--virtual", min=1, help="stages per rank, v")] = None,
    picture: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="write the picture to this file")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="print every instruction, with sends and receives")] = False,
    as_json: Json = False,
) -> None:
    """Check a pipeline schedule and draw it: F and I and W take one unit of time, B takes two, messages none.

    NAME may be a file: a schedule as --text prints it, or as people write it, computes only (docs/pipeline.md).
    """
    made = (
        _read(name, stages, microbatches, virtual) if name not in NAMES else _make(name, stages, microbatches, virtual)
    )
    shown = _checked(made, _formula(made) if name in NAMES else None)
    if picture is not None:
        _write(picture, svg(shown.drawn, f"{_title(made)}, {_bubble(shown)}"))
    if as_json:
        print_json(_document(shown))
        return
    if text:
        print(format_schedule(shown.schedule))
    console = stdout()
    console.print(f"{_title(made)}\n", style="bold")
    console.print(draw(shown.drawn, console.width))
    for line in _facts(shown):
        console.print(line)


def _write(picture: Path, text: str) -> None:
    try:
        picture.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--svg {picture}: {error.strerror}\nWay out: a file in a directory that exists.") from error


def _make(name: str, p: int | None, m: int | None, v: int | None) -> Schedule:
    if p is None:
        raise ValueError(f"schedule {name} of how many pipeline ranks?\nWay out: --stages 4.")
    return make_schedule(name, p, m or 2 * p, v)


def _read(name: str, *sizes: int | None) -> Schedule:
    """The schedule in file ``name``."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"there is no schedule '{name}', and no such file\nWay out: one of {', '.join(NAMES)}.")
    if any(size is not None for size in sizes):
        raise ValueError(f"{name} says itself how large it is: leave out --stages, --microbatches and --virtual")
    return parse_schedule(path.read_text(encoding="utf-8"))


def _checked(made: Schedule, formula: tuple[str, float | None] | None) -> Shown:
    links: Sequence[Link] = chain(len(made.placement))
    check_computes(made)
    whole = made if made.has_messages or len(made.ranks) == 1 else with_messages(made, links)
    start = perf_counter()
    check_schedule(whole, links)
    seconds = perf_counter() - start
    peaks = tuple(peak_in_flight(whole.computes(rank)) for rank in range(len(whole.ranks)))
    return Shown(whole, timeline(whole), peaks, formula, seconds)


def _formula(made: Schedule) -> tuple[str, float | None]:
    bubble, p = NAMES[made.name].bubble, len(made.ranks)
    return bubble.text, bubble.value(p, made.microbatches, len(made.placement) // p)


def _title(made: Schedule) -> str:
    ranks, stages = len(made.ranks), len(made.placement)
    of = f" of {stages // ranks} stages" if stages % ranks == 0 and stages > ranks else ""
    of = of or (f", {stages} stages" if stages != ranks else "")
    return f"{made.name}: {ranks} ranks{of}, {made.microbatches} microbatches"


def _bubble(shown: Shown) -> str:
    text, value = shown.formula or ("", None)
    same = value is not None and abs(value - shown.drawn.bubble) < 1e-9
    return f"bubble {shown.drawn.bubble:.2%}{f' = {text}' if same else ''}"


def _facts(shown: Shown) -> list[str]:
    drawn, schedule = shown.drawn, shown.schedule
    if shown.formula is None:
        beside = "no formula"
    elif shown.formula[1] is not None:
        beside = f"formula {shown.formula[0]}: {shown.formula[1]:.2%}"
    else:
        ranks = len(schedule.ranks)
        least = NAMES[schedule.name].bubble.least(len(schedule.placement) // ranks) * ranks
        beside = f"formula {shown.formula[0]}: from {least} microbatches on"
    held = ", ".join(map(str, shown.peaks))
    count = sum(map(len, schedule.ranks))
    return [
        "",
        f"bubble     {drawn.bubble:.2%} of the computing time ({beside})",
        f"           {drawn.inner_bubble:.2%} on the worst rank between its own first and last compute",
        f"in flight  {held} activations at most, by rank (each of one stage and microbatch)",
        f"check      passed: {count} instructions, {shown.check_s * 1e3:.0f} ms",
    ]


def _document(shown: Shown) -> dict[str, Any]:
    schedule = shown.schedule
    return {
        "name": schedule.name,
        "ranks": len(schedule.ranks),
        "microbatches": schedule.microbatches,
        "placement": list(schedule.placement),
        "bubble": shown.drawn.bubble,
        "bubble_formula": shown.formula and {"text": shown.formula[0], "value": shown.formula[1]},
        "inner_bubble": shown.drawn.inner_bubble,
        "peak_in_flight": list(shown.peaks),
        "check_seconds": shown.check_s,
        "instructions": [[str(step) for step in steps] for steps in schedule.ranks],
        "events": [
            {
                "rank": event.rank,
                "kind": event.kind.value,
                "stage": event.stage,
                "microbatch": event.microbatch,
                "start": event.start_s,
                "end": event.end_s,
            }
            for own in shown.drawn.ranks
            for event in own
        ],
    }
