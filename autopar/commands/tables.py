"""The output of commands: tables on a terminal, or one JSON document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # which import torch: a schedule is drawn without it
    from autopar.analysis.footprint import Holdings
    from autopar.ir.traffic import Transfer

WIDTH_OF_A_PIPE = 110  # rich would take 80 where there is no terminal


def stdout(width: int = WIDTH_OF_A_PIPE) -> Console:
    """The console; ``width`` columns wide where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=1))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Group:
    """A table: the first column is aligned left, the others (numbers) right."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for position, name in enumerate(columns):
        made.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return Group(Text(title, style="bold"), made if made.rows else Text("nothing"), Text())


def traffic_table(title: str, traffic: Sequence[Transfer], steps: float = 1) -> Group:
    """Operations and bytes of one rank per step, its phases beside each other."""
    from autopar.ir.traffic import size_text

    phases = list(dict.fromkeys(entry.phase for entry in traffic))
    rows = []
    for axis, name in dict.fromkeys((entry.axis, entry.name) for entry in traffic):
        cells = []
        for phase in phases:
            chosen = [entry for entry in traffic if (entry.axis, entry.name, entry.phase) == (axis, name, phase)]
            cells.append(_number(sum(entry.operations for entry in chosen) / steps))
            cells.append(size_text(sum(entry.bytes for entry in chosen) / steps))
        rows.append((f"{axis}  {name}", *cells))
    return table(title, ("axis  collective", *(name for phase in phases for name in (phase, "sent"))), rows)


def traffic_json(traffic: Sequence[Transfer], steps: float = 1) -> list[dict[str, Any]]:
    return [
        {
            "axis": entry.axis,
            "collective": entry.name,
            "phase": entry.phase,
            "operations": entry.operations / steps,
            "bytes": entry.bytes / steps,
        }
        for entry in traffic
    ]


def held_table(holdings: Holdings) -> Group:
    from autopar.ir.traffic import size_text

    rows = [("whole model", size_text(holdings.whole), ""), ("one rank", size_text(holdings.rank), "")]
    for axis, split in holdings.split.items():
        rows.append((f"split over {axis}", size_text(split), f"{split / max(1, holdings.whole):.1%}"))
    return table("parameters", ("", "bytes", "of the model"), rows)


def held_json(holdings: Holdings) -> dict[str, Any]:
    return {"whole_bytes": holdings.whole, "rank_bytes": holdings.rank, "split_bytes": dict(holdings.split)}


def _number(count: float) -> str:
    return f"{count:.0f}" if count == int(count) else f"{count:.1f}"
