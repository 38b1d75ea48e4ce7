"""The layers of experts of a program, as a table and as JSON: what was recognised, and what was left and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from autopar.analysis.experts import routed_regions, unrecognised
from autopar.commands.tables import table
from autopar.ir.program import AnyProgram
from autopar.ir.tables import Routed, Unrouted

COLUMNS = ("", "layers", "experts", "for each token", "products", "written as")


def experts_tables(program: AnyProgram) -> list[RenderableType]:
    """Layers that differ in their number alone are one row; nothing for a program without experts."""
    rows: dict[tuple[str, ...], int] = {}
    for region in routed_regions(program):
        sizes = (str(region.experts), str(region.choices), str(len(region.products)))
        row = (_numbered(region.module), *sizes, region.chosen)
        rows[row] = rows.get(row, 0) + 1
    cells = [(module, str(count), *rest) for (module, *rest), count in rows.items()]
    return [*([table("experts", COLUMNS, cells)] if cells else []), *map(Text, _complaints(unrecognised(program)))]


def _complaints(left: Sequence[Unrouted]) -> list[str]:
    """What is said of layers that were left; once for layers that differ in their number alone."""
    texts: dict[str, int] = {}
    for layer in left:
        where = f"experts of {_numbered(layer.module) or 'the model'}"
        text = f"{where}: {layer.chosen}, since {layer.reason}\n  {layer.source}\n"
        texts[text] = texts.get(text, 0) + 1
    return [text if count == 1 else f"{count} layers of {text}" for text, count in texts.items()]


def _numbered(module: str) -> str:
    """``blocks.*.moe`` for any of ``blocks.0.moe``, ``blocks.1.moe``, ..."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def experts_json(program: AnyProgram) -> dict[str, Any]:
    return {
        "recognised": [_region(region) for region in routed_regions(program)],
        "left": [
            {"module": layer.module, "reason": layer.reason, "source": layer.source} for layer in unrecognised(program)
        ],
    }


def _region(region: Routed) -> dict[str, Any]:
    return {
        "module": region.module,
        "experts": region.experts,
        "for_each_token": region.choices,
        "products": list(region.products),
        "written_as": region.chosen,
    }
