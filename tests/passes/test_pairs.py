"""The pair on top of every pass: what stands before ``after:`` goes in, what stands behind it has to come out.

    before, on mesh(dp=2), Plan(zero=3):        the mesh and the plan are said where they matter
      x = input : f32[8@dp,4]
      ...
    after:
      x = input : f32[8@dp,4]
      ...

Both are text forms. A pair about the graphs of a rank has sections ``forward:`` and ``backward:``, one about stages
``stage 0 of 2``. A section that is not written is empty, or behind ``after:`` as it was before; the graph of a program
is then that of its ``forward:``. What the text form does not say (values of constants, dtypes in which tensors arrive)
stands in the first line too: ``before, with triangle=torch.ones(8, 8).tril():``.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.ir.graph_pass import Pass
from autopar.ir.parse import parse
from autopar.ir.program import AnyProgram
from autopar.ir.tables import Pins
from autopar.passes import COMPILER
from autopar.plan import Plan
from autopar.precision import Precision

ROOT = Path(__file__).parent.parent.parent
PASSES = [step for phase in COMPILER for step in phase.passes]
PAIR = re.compile(
    r"^before(?:, on (?P<mesh>mesh\([^)]*\)))?(?:, (?P<plan>Plan\(.*?\)))?(?:, with (?P<given>.+))?:\n"
    r"(?P<before>.+?)^after:\n(?P<after>.+?)(?=^\S|\Z)",
    re.MULTILINE | re.DOTALL,
)
SECTION = re.compile(r"^(forward|backward|inference):$|^(counts mesh\(.*|stage \d+ of \d+ .*|schedule .*)$")
EMPTY = "  return\n"
ROLE = ("forward:", "backward:", "inference:")
KNOWN = {"torch": torch, "Plan": Plan, "Precision": Precision}


def pair_of(step: Pass[Any, Any]) -> re.Match[str]:
    module = inspect.getmodule(step.rewrite)
    found = PAIR.search(inspect.getdoc(module) or "")
    assert found, f"{step.name} has no pair on top: 'before:' and 'after:', each with a program in text form below"
    return found


def sections(block: str) -> dict[tuple[str, str], str]:
    """(part, section) -> its lines; part: "" or "stage 0 of 2 mesh()"; section: "" or "forward:"."""
    found: dict[tuple[str, str], str] = {}
    part, section = "", ""
    for line in map(str.strip, block.splitlines()):
        heading = SECTION.fullmatch(line)
        if heading:
            part, section = (part, line) if heading[1] else (line, "")
        elif line.startswith(":"):  # the type of a long line
            found[part, section] = f"{found[part, section].rstrip()} {line}\n"
        elif line:
            found[part, section] = f"{found.get((part, section), '')}  {line}\n"
    return found


def with_graphs_of_programs(found: dict[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    """``found``, with the graph of each program that is not written: that of ``forward:``, which returns more."""
    for part in dict.fromkeys(["", *(part for part, _ in found)]):
        forward = found.get((part, "forward:"), EMPTY)
        found.setdefault((part, ""), re.sub(r"(return|,) saved .*", r"\1", forward).rstrip(",\n") + "\n")
    return found


def whole_text(mesh: str, found: dict[tuple[str, str], str]) -> str:
    """The text form of all sections; those that are missing are empty."""
    text = ""
    for part in dict.fromkeys(["", *(part for part, _ in found)]):
        text += f"{part or f'program {mesh}'}\n{found[part, '']}"
        if any((part, section) in found for section in ROLE):
            text += "".join(f"\n{section}\n" + found.get((part, section), EMPTY) for section in ROLE)
        text += "\n"
    return text


def programs(step: Pass[Any, Any]) -> tuple[AnyProgram, AnyProgram]:
    """The program before the pass, and that which is to come out."""
    pair = pair_of(step)
    mesh, plan = pair["mesh"] or "mesh()", eval(pair["plan"] or "Plan()", KNOWN)
    given: dict[str, Any] = eval(f"dict({pair['given'] or ''})", KNOWN)
    before = with_graphs_of_programs(sections(pair["before"]))
    after = {**before, **sections(pair["after"])}
    constants = {name: entry for name, entry in given.items() if isinstance(entry, torch.Tensor)}
    program = parse(whole_text(mesh, before), plan, constants)
    dtypes = {name: entry for name, entry in given.items() if isinstance(entry, torch.dtype)}
    program = replace(program, pins=Pins(dtypes=dtypes))
    return program, parse(whole_text(mesh, after), plan)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_the_pair_on_top(step: Pass[Any, Any]) -> None:
    before, after = programs(step)
    assert str(before) != str(after)
    assert str(step(before)) == str(after)


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_every_pass_has_a_test_file(step: Pass) -> None:
    module = inspect.getmodule(step.rewrite)
    assert module is not None and module.__file__ is not None
    room = "passes" if module.__name__.startswith("autopar.passes") else module.__name__.split(".")[1]
    assert (ROOT / "tests" / room / f"test_{step.name}.py").exists()
