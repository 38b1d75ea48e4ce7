"""The table of collectives: that its rows agree with each other, and that what it cannot hold itself has every row."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.communication.communicator import Communicator
from autopar.ir import collectives as comm
from autopar.simulator.lockstep import RULES

DOCS = Path(__file__).parents[2] / "docs" / "text_form.md"
IMPLIED = ("axis", "op", "ways", "outer", "ratio", "length")  # the axis is there, the others follow or have a default
GRADIENT = {"I": "I", "R": "P", "P": "R", "S": "S"}  # how the gradient of a value lies that lies so
rows = pytest.mark.parametrize("name", comm.COLLECTIVES)


@rows
def test_the_dual_takes_the_gradient_back(name: str) -> None:
    row = comm.COLLECTIVES[name]
    dual = comm.COLLECTIVES[row.dual]
    assert (dual.before, dual.after) == (GRADIENT[row.after], GRADIENT[row.before])
    assert dual.dual == name


@rows
def test_the_dual_of_the_dual_has_the_first_arguments(name: str) -> None:
    known = {"axis": "tp", "ways": 2, "op": "sum", "dim": 0, "outer": 3, "ratio": [2, 1], "length": 18}
    known |= {"source": [0, 1, 1], "target": [1, 1, 1], "by": 3, "send": "there", "receive": "back"}
    known |= {"counts": "rows", "layer": "moe", "group": "ep", "places": [1, 0]}
    arguments = tuple(known[parameter] for parameter in comm.COLLECTIVES[name].form.parameters)
    dual, turned = comm.dual_of(name, arguments)
    if comm.COLLECTIVES[dual].form is comm.COLLECTIVES[name].form:
        assert comm.dual_of(dual, turned) == (name, arguments)
    else:
        assert {comm.REDUCTION, comm.AXIS} == {comm.COLLECTIVES[dual].form, comm.COLLECTIVES[name].form}


@rows
@pytest.mark.parametrize("ways", (1, 2, 3, 4))
def test_what_is_sent(name: str, ways: int) -> None:
    row = comm.COLLECTIVES[name]
    sent = row.sends(ways, 12 * ways)
    assert isinstance(sent, int) and row.sends(ways, 36 * ways) == 3 * sent, "linear in the bytes"
    assert (sent > 0) == (ways > 1 and name in comm.MOVING), "nothing on an axis of one rank"
    assert not row.starts or name in comm.MOVING, "what sends nothing need not start early"
    assert bool(row.short) == (name in comm.MOVING), "tables have a column for what sends"


@rows
def test_only_collectives_with_a_dim_change_the_shape(name: str) -> None:
    row = comm.COLLECTIVES[name]
    assert not (row.grows and row.shrinks)
    assert (row.grows or row.shrinks) == ("dim" in row.form.parameters)


def test_what_is_started_is_what_it_is_said_to_be() -> None:
    for target, start in comm.STARTS.items():
        row, started = comm.row_of(comm.TARGETS[target]), comm.row_of(comm.TARGETS[start])
        same = (row.before, row.form, row.sends(3, 12)) == (started.before, started.form, started.sends(3, 12))
        assert same and row.grows == started.grows


@pytest.mark.parametrize("name", comm.NAMES)
def test_the_runtime_has_a_method(name: str) -> None:
    assert callable(getattr(Communicator, name))


@rows
def test_the_simulator_has_a_kernel(name: str) -> None:
    assert name in RULES


def documented() -> list[str]:
    """The table of docs/text_form.md as the rows say it."""
    lines = ["| line | from -> to | forward | backward |", "|---|---|---|---|"]
    for name, row in comm.COLLECTIVES.items():
        said = [parameter for parameter in row.form.parameters if parameter not in IMPLIED]
        more = "".join(f", {parameter}={number}" for number, parameter in enumerate(said, 1))
        dual = "nothing" if comm.COLLECTIVES[row.dual].does_nothing else f"`comm.{row.dual}`"
        lines.append(f"| `comm.{name}(x, tp{more})` | {row.before} -> {row.after} | {row.does} | {dual} |")
    return lines


def test_the_document_has_every_row(request: pytest.FixtureRequest) -> None:
    text = DOCS.read_text(encoding="utf-8")
    start = text.index("| line | ")
    end = text.index("\n\n", start)
    if request.config.getoption("--update-golden"):
        DOCS.write_text(text[:start] + "\n".join(documented()) + text[end:], encoding="utf-8")
    else:
        assert text[start:end].splitlines() == documented(), "pytest --update-golden writes the table"
