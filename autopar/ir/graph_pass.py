"""Passes, phases and what runs them: clone, run, lint, check contracts, dump on request, keep evidence of a failure.

    @graph_pass(requires=(every_value_has_a_layout,), ensures=(no_partial_value_escapes,))
    def reduce_partials(program: Program) -> Program: ...

    Phase("split", (split_batch, split_tensors, reduce_partials))

``AUTOPAR_DUMP=all`` (or pass names with commas) prints the program after those passes to stderr. When a pass fails, the
program before it is written to ``autopar-failed-<pass>.txt``, which :func:`read_replay` reads, in the directory
``AUTOPAR_DUMP_DIR`` (``autopar --dump DIR``), else in the user's cache; each pass has one such file, that of its latest
failure.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import platformdirs
import torch
from torch import fx

from autopar.errors import AutoparError, InvariantError, ProgramFileError, near_names
from autopar.ir.collection import no_collection
from autopar.ir.fast_graph import called, is_sound, sort_users
from autopar.ir.parse import parse
from autopar.ir.program import AnyProgram, PipelinedProgram, Program, format_program
from autopar.ir.text import operator_name
from autopar.plan import Plan

DUMP = "AUTOPAR_DUMP"
DUMP_DIRECTORY = "AUTOPAR_DUMP_DIR"
TRACE = "trace"  # the step before all passes
_PLAN = "# plan: "

Before = TypeVar("Before", bound=AnyProgram)
After = TypeVar("After", bound=AnyProgram)
Rewrite = Callable[[Before], After]
Contract = Callable[[Any], None]  # for the kind of program that the pass takes, or gives
Condition = Callable[[AnyProgram], bool]


@dataclass(frozen=True)
class Pass(Generic[Before, After]):
    """A named step of the compiler. Calling it runs it, on a copy unless told otherwise, and checks its contracts.

    Nearly all passes take a program and give one. ``cut_stages`` turns it into a pipelined one, ``differentiate`` takes
    either, ``schedule_microbatches`` takes pipelined ones.
    """

    rewrite: Rewrite[Before, After]
    requires: tuple[Contract, ...] = ()
    ensures: tuple[Contract, ...] = ()
    when: Condition = lambda program: True
    copies: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.rewrite.__doc__)

    @property
    def name(self) -> str:
        return self.rewrite.__name__

    @property
    def summary(self) -> str:
        """The first sentence of the file that holds this pass."""
        text = " ".join((sys.modules[self.rewrite.__module__].__doc__ or "").split("\n\n")[0].split())
        return text.partition(". ")[0].rstrip(".:")

    def __call__(self, program: Before, *, is_own: bool = False) -> Before | After:
        """The program after this pass; ``program`` itself is left as it is, and not copied if the pass is not needed.

        ``is_own``: nobody else has ``program``, which need not be left as it is, and is not copied.
        Raises InvariantError for a broken contract, and whatever the pass itself raises.
        """
        if not self.when(program):
            return replace(program, passes=(*program.passes, self.name))
        _hold(self.requires, program, f"required by pass {self.name}")
        own: Any = program.clone() if self.copies and not is_own else program
        if own is program and self.copies:
            for graph in own.graphs.values():
                sort_users(graph)
        result: Any = self.rewrite(own)
        if not isinstance(result, AnyProgram):
            raise InvariantError(f"pass {self.name} returned {type(result).__name__}\nLikely fix: return the program")
        kept = () if self.copies else program.graphs.values()
        for graph in result.graphs.values():
            if not any(graph is one for one in kept):
                _lint(graph)
        _hold(self.ensures, result, f"broken by pass {self.name}")
        return cast(After, replace(result, passes=(*program.passes, self.name)))


def graph_pass(
    *,
    requires: Sequence[Contract] = (),
    ensures: Sequence[Contract] = (),
    when: Condition = lambda program: True,
    copies: bool = True,
) -> Callable[[Rewrite[Before, After]], Pass[Before, After]]:
    """Make a function ``Program -> Program`` a pass. ``requires`` hold before it, ``ensures`` after it.

    ``when``: the choice in the plan or the mesh, or the operator in the graph (:func:`calls`), that needs it; without
    that the program stays as it is, neither copied nor checked (both take time). ``copies``: whether it rewrites the
    graphs of its argument, so that it must get copies.
    """

    def decorate(rewrite: Rewrite[Before, After]) -> Pass[Before, After]:
        return Pass(rewrite, tuple(requires), tuple(ensures), when, copies)

    return decorate


def calls(wanted: Callable[[Any], bool]) -> Condition:
    """Whether the graph calls an operator for which ``wanted(target)`` is true."""
    return lambda program: any(map(wanted, called(program.graph)))


@dataclass(frozen=True)
class Level:
    """The contracts between passes: ``contracts`` of a program, or of each stage of a pipeline by itself.

    ``of_stages``: contracts of all stages together.
    """

    name: str
    contracts: tuple[Contract, ...] = ()
    of_stages: tuple[Contract, ...] = ()

    def check(self, program: AnyProgram, step: str, kept: Collection[Program] = ()) -> None:
        """Check all contracts. Raises InvariantError with the broken contract, the stage, and ``step`` as the cause.

        ``kept``: stages that are as they were when these contracts were checked.
        """
        said = f"of a {self.name} program, broken by {step}"
        if isinstance(program, Program):
            _hold(self.contracts, program, said)
            return
        for number, stage in enumerate(program.stages):
            if not any(stage is one for one in kept):
                _hold(self.contracts, stage, f"of stage {number} {said}")
        _hold(self.of_stages, program, said)


def _hold(contracts: Iterable[Contract], program: AnyProgram, said: str) -> None:
    for contract in contracts:
        try:
            contract(program)
        except InvariantError as error:
            raise InvariantError(f"{error}\nContract {getattr(contract, '__name__', contract)}, {said}") from None


UNCHECKED = Level("unchecked")


@dataclass(frozen=True)
class Phase:
    """Passes that run one after another; after each the contracts of ``level`` hold.

    ``each_stage``: on a pipelined program, the passes run on each stage by itself.
    """

    name: str
    passes: tuple[Pass[Any, Any], ...]
    level: Level = UNCHECKED
    each_stage: bool = False

    def needs(self, step: Pass[Any, Any], program: AnyProgram) -> bool:
        """Whether ``step`` of this phase does something to ``program``."""
        return any(map(step.when, program.parts)) if self.each_stage else step.when(program)

    def run(
        self, step: Pass[Any, Any], program: AnyProgram, *, is_own: bool = False, checked: Level = UNCHECKED
    ) -> AnyProgram:
        """``program`` after ``step`` of this phase. Raises the errors of the pass, and InvariantError for contracts.

        ``is_own``: nobody else has ``program``, which need not be left as it is. ``checked``: its level, where its
        contracts are known to hold.
        """
        is_needed = self.needs(step, program)
        if self.each_stage and isinstance(program, PipelinedProgram):
            stages = tuple(step(stage, is_own=is_own) for stage in program.stages)
            after: AnyProgram = replace(program, stages=stages, passes=(*program.passes, step.name))
        else:
            after = step(program, is_own=is_own)
        if is_needed:
            kept = program.parts if not step.copies and {*self.level.contracts} <= {*checked.contracts} else ()
            self.level.check(after, f"pass {step.name}", kept)
        return after


def steps_of(
    phases: Sequence[Phase], since: str | None = None, until: str | None = None
) -> tuple[tuple[Phase, Pass[Any, Any]], ...]:
    """The passes from ``since`` to ``until``, both included, with their phases; none for ``until="trace"``.

    Raises ValueError for an unknown pass.
    """
    found = [(phase, step) for phase in phases for step in phase.passes]
    names = [TRACE, *(step.name for _, step in found)]
    first = 0 if since is None else names.index(since)
    if until is not None and until not in names[first:]:
        there = ", ".join(names[first:])
        near = near_names(until, names[first:])
        raise ValueError(f"there is no pass '{until}' here; in order there are {there}{near}\nWay out: one of these.")
    return tuple(found[max(first - 1, 0) : None if until is None else names.index(until)])


def run_phases(
    program: AnyProgram, phases: Sequence[Phase], since: str | None = None, until: str | None = None
) -> AnyProgram:
    """``program`` after the passes of ``phases``, in order; only after those from ``since`` to ``until``.

    Errors of autopar and ValueErrors keep their type and get a note that says which pass failed, where the program
    before it was written and how to replay it; anything else a pass raises becomes an AutoparError with that note.
    Raises ValueError for an unknown pass.
    """
    steps, dumped = steps_of(phases, since, until), _dumped(phases)
    start, is_own, checked = program, False, UNCHECKED
    if since is None and phases:
        phases[0].level.check(program, TRACE)
    with no_collection(), _as_usual():
        for number, (phase, step) in enumerate(steps):
            try:
                holds = phase.level if phase.needs(step, program) else checked
                after = phase.run(step, program, is_own=is_own and step.name not in dumped, checked=checked)
            except (AutoparError, ValueError) as error:
                error.add_note(_keep_evidence(_again(start, steps[:number]) if is_own else program, step))
                raise
            except Exception as error:
                note = _keep_evidence(_again(start, steps[:number]) if is_own else program, step)
                raise AutoparError(f"{type(error).__name__} in pass {step.name}: {error}\n{note}") from error
            if step.name in dumped:
                print(f"# {step.name}: {count_difference(program, after)}\n{after}\n", file=sys.stderr)
            program, checked = after, holds
            is_own = {*map(id, start.graphs.values())}.isdisjoint(map(id, program.graphs.values()))
    return program


def _again(program: AnyProgram, steps: Iterable[tuple[Phase, Pass[Any, Any]]]) -> AnyProgram:
    """``program`` after ``steps`` once more: a pass that failed may have left half of what it got."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all has been said
        for phase, step in steps:
            program = phase.run(step, program)
    return program


def run_passes(program: AnyProgram, passes: Iterable[Pass[Any, Any]]) -> AnyProgram:
    """``program`` after ``passes``, in order, as :func:`run_phases` runs them."""
    return run_phases(program, (Phase("", tuple(passes)),))


@contextmanager
def _as_usual() -> Iterator[None]:
    """Whatever the caller's mode: gradients flow, and autocast, whose casts are nodes by now, casts nothing again."""
    cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
    with torch.inference_mode(False), torch.enable_grad(), cpu, cuda:
        yield


# ---------------------------------------------------------------- checks


def _lint(graph: fx.Graph) -> None:
    if is_sound(graph):
        return
    try:
        graph.lint()
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        raise InvariantError(f"{problem}\nLikely fix: insert nodes with graph.inserting_before / after") from error


# ---------------------------------------------------------------- looking


def _dumped(phases: Sequence[Phase]) -> frozenset[str]:
    """The passes after which the program is printed."""
    wanted = [name.strip() for name in os.environ.get(DUMP, "").split(",") if name.strip()]
    names = [step.name for phase in phases for step in phase.passes]
    if "all" in wanted:
        return frozenset(names)
    for name in wanted:
        if name not in names:
            print(f"# {DUMP}: no pass here is called '{name}'; there are {', '.join(names)}", file=sys.stderr)
    return frozenset(wanted)


def count_difference(before: AnyProgram, after: AnyProgram) -> str:
    """The change in the numbers of operators: ``all_reduce 0 -> 4, aten.add.Tensor 6 -> 2``."""
    old, new = before.graphs, after.graphs
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


def _keep_evidence(program: AnyProgram, step: Pass[Any, Any]) -> str:
    """Write the program before the pass that failed; gives where it is, and how to run the pass on it again."""
    path = dump_directory() / f"autopar-failed-{step.name}.txt"
    heading = f"# the program before pass {step.name} failed (constants read back as zeros)\n"
    heading += f"# it went through: {', '.join(program.passes) or 'no pass'}\n"
    plan = f"{_PLAN}{json.dumps(program.plan.to_json(), sort_keys=True)}\n"
    draft = path.with_suffix(f".{os.getpid()}.tmp")  # several ranks may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(f"{heading}{plan}{format_program(program, origins=True)}\n", encoding="utf-8")
        draft.replace(path)
    except Exception as error:
        with suppress(OSError):
            draft.unlink()
        return f"In pass {step.name}; the program before it could not be written to {path}: {error}"
    command = f"autopar replay {shlex.quote(str(path))} --pass {step.name}"
    return f"In pass {step.name}; the program before it is in {path}. To run the pass on it again:\n  {command}"


def dump_directory() -> Path:
    """Where failures leave their programs: never in the working directory, unless the user says so."""
    return Path(os.environ.get(DUMP_DIRECTORY) or platformdirs.user_cache_path("autopar"))


def read_replay(path: str | Path) -> AnyProgram:
    """The program in a file that a failed pass left, with its plan; constants are zeros.

    Raises ProgramFileError.
    """
    try:
        source = Path(path).read_text(encoding="utf-8")
        plans = [line.removeprefix(_PLAN) for line in source.splitlines()[:9] if line.startswith(_PLAN)]
        plan = Plan.from_json(json.loads(plans[0])) if plans else None
    except (OSError, ValueError) as error:
        raise ProgramFileError(f"{path} cannot be read: {error}\nWay out: a file that a failed pass left.") from error
    return parse(source, plan, origins=True)
