"""``autopar replay``: run a pass again on the program that it failed on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autopar.commands.options import Json
from autopar.commands.tables import print_json
from autopar.errors import near_names


def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="autopar-failed-<pass>.txt")],
    name: Annotated[str, typer.Option("--pass", metavar="NAME", help="the pass to run on it")],
    as_json: Json = False,
) -> None:
    """Run a pass on the program in FILE, which a failed pass left behind, and print the result."""
    from autopar.ir.graph_pass import count_difference, read_replay, steps_of
    from autopar.passes import COMPILER

    steps = {step.name: (phase, step) for phase, step in steps_of(COMPILER)}
    if name not in steps:
        near = near_names(name, steps)
        raise ValueError(
            f"there is no pass '{name}'; in order there are {', '.join(steps)}{near}\nWay out: one of these."
        )
    before, (phase, step) = read_replay(file), steps[name]
    after = phase.run(step, before)
    difference = count_difference(before, after)
    if as_json:
        print_json({"pass": name, "difference": difference, "before": str(before), "after": str(after)})
        return
    print(f"# {name}: {difference}\n{after}")
