"""Passes and what runs them: clone, run, lint, check the contracts, dump on request, keep the evidence of a failure.

    @graph_pass(requires=(every_value_has_a_layout,), ensures=(no_partial_value_escapes,))
    def reduce_partials(program: Program) -> Program: ...

``AUTOPAR_DUMP=all`` (or pass names with commas) prints the program after those passes to stderr. When a pass fails, the
program before it is written to ``autopar-failed-<pass>.txt``, which :func:`read_replay` reads.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx

from autopar.errors import AutoparError, InvariantError, ProgramFileError
from autopar.ir.invariants import Contract
from autopar.ir.parse import parse
from autopar.ir.program import Program, format_program
from autopar.ir.text import operator_name
from autopar.plan import Plan

DUMP = "AUTOPAR_DUMP"
_PLAN = "# plan: "

Rewrite = Callable[[Program], Program]
Condition = Callable[[Program], bool]


@dataclass(frozen=True)
class Pass:
    """A named step of the compiler. Calling it runs it on a copy and checks its contracts."""

    rewrite: Rewrite
    requires: tuple[Contract, ...] = ()
    ensures: tuple[Contract, ...] = ()
    annotates_only: bool = False
    when: Condition = lambda program: True

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.rewrite.__doc__)

    @property
    def name(self) -> str:
        return self.rewrite.__name__

    def __call__(self, program: Program) -> Program:
        """The program after this pass; ``program`` itself is left as it is, and not copied if the pass is not needed.

        Raises InvariantError for a broken contract, and whatever the pass itself raises.
        """
        if not self.when(program):
            return replace(program, passes=(*program.passes, self.name))
        for contract in self.requires:
            contract(program)
        result = self.rewrite(program.clone())
        if not isinstance(result, Program):
            raise InvariantError(f"pass {self.name} returned {type(result).__name__}\nLikely fix: return the program")
        if self.annotates_only and _structure(result) != _structure(program):
            raise InvariantError(
                f"pass {self.name} annotates only, but changed {_first_change(program, result)}\n"
                "Likely fix: rewrite in a pass of its own, or drop annotates_only"
            )
        for graph in graphs_of(result).values():
            _lint(graph)
        for contract in self.ensures:
            contract(result)
        return replace(result, passes=(*program.passes, self.name))


def graph_pass(
    *,
    requires: Sequence[Contract] = (),
    ensures: Sequence[Contract] = (),
    annotates_only: bool = False,
    when: Condition = lambda program: True,
) -> Callable[[Rewrite], Pass]:
    """Makes a function ``Program -> Program`` a pass. ``requires`` hold before it, ``ensures`` after it.

    ``annotates_only``: it may set values and decisions, and must leave nodes, arguments, inputs and outputs alone.
    ``when``: what asks for it, in the plan or the mesh; without that the program stays as it is (a copy takes time).
    """

    def decorate(rewrite: Rewrite) -> Pass:
        return Pass(rewrite, tuple(requires), tuple(ensures), annotates_only, when)

    return decorate


def run_passes(program: Program, passes: Iterable[Pass]) -> Program:
    """``program`` after ``passes``, in order.

    Errors of autopar and ValueErrors keep their type and get a note that says which pass failed, where the program
    before it was written and how to replay it; anything else a pass raises becomes an AutoparError with that note.
    """
    passes = tuple(passes)
    dumped = _dumped(passes)
    for step in passes:
        try:
            after = step(program)
        except (AutoparError, ValueError) as error:
            error.add_note(_keep_evidence(program, step))
            raise
        except Exception as error:
            note = _keep_evidence(program, step)
            raise AutoparError(f"{type(error).__name__} in pass {step.name}: {error}\n{note}") from error
        if step.name in dumped:
            print(f"# {step.name}: {count_difference(program, after)}\n{after}\n", file=sys.stderr)
        program = after
    return program


# ---------------------------------------------------------------- checks


def graphs_of(program: Program) -> dict[str, fx.Graph]:
    """All graphs of the program: ``""`` for its own, ``forward``, ``backward 1``, ... for those of its roles."""
    found = {"": program.graph}
    for position, role in enumerate(program.roles):
        number = f" {position}" if len(program.roles) > 1 else ""
        for kind in ("forward", "backward", "inference"):
            graph = getattr(role, kind)
            if graph is not None:
                found[f"{kind}{number}"] = graph
    return found


def _lint(graph: fx.Graph) -> None:
    try:
        graph.lint()
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        raise InvariantError(f"{problem}\nLikely fix: insert nodes with graph.inserting_before / after") from error


def _structure(program: Program) -> list[tuple[Any, ...]]:
    """Everything about a program that an annotating pass must leave alone."""
    rows: list[tuple[Any, ...]] = [
        (node.name, node.op, str(node.target), str(node.args), str(node.kwargs)) for node in program.graph.nodes
    ]
    return [*rows, ("inputs", program.inputs), ("outputs", program.outputs)]


def _first_change(before: Program, after: Program) -> str:
    rows, changed = _structure(before), _structure(after)
    for row, other in zip(rows, changed):
        if row != other:
            return str(row[0])
    return str((rows + changed)[min(len(rows), len(changed))][0])


# ---------------------------------------------------------------- looking


def _dumped(passes: Sequence[Pass]) -> frozenset[str]:
    """The passes after which to print the program."""
    wanted = [name.strip() for name in os.environ.get(DUMP, "").split(",") if name.strip()]
    names = [step.name for step in passes]
    if "all" in wanted:
        return frozenset(names)
    for name in wanted:
        if name not in names:
            print(f"# {DUMP}: no pass here is called '{name}'; there are {', '.join(names)}", file=sys.stderr)
    return frozenset(wanted)


def count_difference(before: Program, after: Program) -> str:
    """What a pass did to the numbers of operators: ``all_reduce 0 -> 4, aten.add.Tensor 6 -> 2``."""
    old, new = graphs_of(before), graphs_of(after)
    texts = []
    for title, graph in new.items():
        first, second = _counts(old.get(title)), _counts(graph)
        names = sorted(first.keys() | second.keys())
        changed = [f"{name} {first[name]} -> {second[name]}" for name in names if first[name] != second[name]]
        if title not in old:
            changed = [f"{len(graph.nodes)} nodes"]
        texts += [f"{title}: " * bool(title) + ", ".join(changed)] if changed else []
    return "; ".join(texts) or "the same operators"


def _counts(graph: fx.Graph | None) -> Counter[str]:
    nodes = graph.nodes if graph is not None else ()
    return Counter(operator_name(n.target).removeprefix("comm.") for n in nodes if n.op == "call_function")


# ---------------------------------------------------------------- failures


def _keep_evidence(program: Program, step: Pass) -> str:
    """Writes the program before the pass that failed; says where, and how to run the pass on it again."""
    path = Path(f"autopar-failed-{step.name}.txt")
    heading = f"# the program before pass {step.name} failed (constants read back as zeros)\n"
    heading += f"# it went through: {', '.join(program.passes) or 'no pass'}\n"
    plan = f"{_PLAN}{json.dumps(program.plan.to_json(), sort_keys=True)}\n"
    draft = path.with_suffix(f".{os.getpid()}.tmp")  # several ranks may write the same file
    try:
        draft.write_text(f"{heading}{plan}{format_program(program, origins=True)}\n", encoding="utf-8")
        draft.replace(path)
    except Exception as error:
        with suppress(OSError):
            draft.unlink()
        return f"In pass {step.name}; the program before it could not be written to {path}: {error}"
    command = f"autopar replay {shlex.quote(str(path))} --pass {step.name}"
    return f"In pass {step.name}; the program before it is in {path}. To run the pass on it again:\n  {command}"


def read_replay(path: str | Path) -> Program:
    """The program in a file that a failed pass left, with its plan; constants are zeros.

    Raises ProgramFileError.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
        plans = [line.removeprefix(_PLAN) for line in source.splitlines()[:9] if line.startswith(_PLAN)]
        plan = Plan.from_json(json.loads(plans[0])) if plans else None
    except (OSError, ValueError) as error:
        raise ProgramFileError(f"{path} cannot be read: {error}") from error
    return parse(source, plan, origins=True)
