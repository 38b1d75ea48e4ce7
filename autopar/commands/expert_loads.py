"""Recorded loads of experts: read from the log of ``autopar train``, and as a table, with what placing would give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from autopar.commands.tables import table
from autopar.ir.load import ExpertLoad
from autopar.routing.placement import balanced_placement, imbalance

COLUMNS = ("layer", "rows", "dropped", "fewest / most of an expert", "fullest rank / mean", "if placed by load")


def read_loads(path: Path) -> dict[str, ExpertLoad]:
    """Layer -> the sum of what the lines of a log recorded. Raises ValueError where there is nothing."""
    found: dict[str, ExpertLoad] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            for layer, load in json.loads(line).get("expert_load", {}).items():
                more = ExpertLoad.from_json(load)
                found[layer] = found[layer] + more if layer in found else more
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}\nWay out: the --log of autopar train, a file.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no log of autopar train whose steps recorded one mesh: {error}") from error
    if not found:
        raise ValueError(
            f"{path} has no load of experts\nWay out: autopar train ... --plan record_load=true --log {path}"
        )
    return found


def loads_tables(loads: Mapping[str, ExpertLoad]) -> list[RenderableType]:
    """A table with one row for each layer; nothing where nothing was counted."""
    placed = balanced_placement(loads)
    rows = []
    for layer, load in loads.items():
        after = imbalance(load, placed[layer])
        spread = f"{min(load.experts):,} / {max(load.experts):,}"
        rows.append(
            (layer, f"{sum(load.experts):,}", f"{load.lost:,}", spread, f"{load.imbalance:.2f}", f"{after:.2f}")
        )
    return [table("load of the experts", COLUMNS, rows)] if rows else []


def loads_json(loads: Mapping[str, ExpertLoad]) -> dict[str, Any]:
    """``expert_load``: layer -> what was counted, and the order that would balance it; nothing if nothing was."""
    placed = balanced_placement(loads)
    found = {
        layer: load.to_json()
        | {"imbalance": load.imbalance, "placement": list(placed[layer]), "placed": imbalance(load, placed[layer])}
        for layer, load in loads.items()
    }
    return {"expert_load": found} if found else {}
