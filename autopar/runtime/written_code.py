"""The Python of a program as it is kept with it: a rank that finds it writes and compiles none.

It is read from files that nobody else can write (:mod:`autopar.cache.folder`), by the version of Python that wrote it;
and for graphs that nobody has looked into since, as they may have been changed.
"""

from __future__ import annotations

import marshal
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import fx

from autopar.autodiff.halves import backward_steps
from autopar.autodiff.hoist import Gathers
from autopar.codegen.python import RankFunction, code_of, emit, function_of
from autopar.ir.collectives import axes_used
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.stored_graph import number_of, shelf_of
from autopar.runtime.rank_code import RankCode
from autopar.runtime.rank_graphs import INFERENCE, RankGraphs, model_graphs, passed_on, stage_graphs

QUICKLY = 1  # of zlib's levels


# ---------------------------------------------------------------- writing


def written(program: AnyProgram, number: Callable[[fx.Graph], int], packed: Callable[[list[fx.Graph]], bytes]) -> bytes:
    """The Python of all parts of ``program``, for :class:`autopar.ir.stored_graph.Shelf`.

    ``number``: that of a graph on its shelf; ``packed`` makes bytes of other graphs, for ``Shelf.others``. Raises
    InvariantError where a graph cannot be written as Python.
    """
    found = {}
    for part, graphs, gradients in _codes(program):
        sources = {name: emit({name: graph}, part) for name, graph in graphs.usual.items()}
        found[_place(part, number)] = {
            "functions": {name: (source, code_of(source, name)) for name, source in sources.items()},
            "rare": list(graphs.rare),
            "gathered": {name: (each.parameters, each.owners) for name, each in graphs.gathered.items()},
            "gathers": packed([each.graph for each in graphs.gathered.values()]) if graphs.gathered else b"",
            "passed on": {name: passed_on(graphs[name]) for name in (*graphs.usual, *graphs.rare)},
            "axes": axes_used(part.graphs.values()),
            "axes of inference": axes_used([part.graphs.get(INFERENCE, part.graph)]),
            "gradients": gradients,
        }
    return zlib.compress(marshal.dumps(found), QUICKLY)


def _place(part: Program, number: Callable[[fx.Graph], int]) -> str:
    """Of one part among those of a program: stages that are alike may have graphs in common."""
    return f"{number(part.graph)} {number(part.required_role.forward)}"


# ---------------------------------------------------------------- reading


class WrittenCode(RankCode):
    """As :class:`RankCode`; its graphs are made when somebody asks for one.

    ``made``: what makes them; ``gathered``: those that are there already.
    """

    def __init__(
        self,
        program: Program,
        kept: Mapping[str, Any],
        gathered: Mapping[str, Gathers],
        made: Callable[[], RankGraphs],
    ) -> None:
        made = cache(made)
        usual = _Later(tuple(kept["functions"]), lambda: made().usual)
        rare = _Later(tuple(kept["rare"]), lambda: made().rare)
        self._kept = kept
        super().__init__(program, RankGraphs(usual, rare, gathered))

    @property
    def axes(self) -> list[str]:
        return list(self._kept["axes"])

    @property
    def axes_of_inference(self) -> list[str]:
        return list(self._kept["axes of inference"])

    @property
    def gradients(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        found: tuple[tuple[str, ...], tuple[str, ...]] | None = self._kept["gradients"]
        return found

    def passed_on(self, name: str) -> Sequence[int]:
        found: list[int] = self._kept["passed on"][name]
        return found

    def _compiled(self, name: str, labelled: bool) -> RankFunction:
        kept = self._kept["functions"].get(name)
        if labelled or kept is None:
            return super()._compiled(name, labelled)
        source, code = kept
        return function_of(code, source, name)


class _Later(Mapping[str, fx.Graph]):
    """Graphs of known names that are made when one is asked for."""

    def __init__(self, names: tuple[str, ...], made: Callable[[], Mapping[str, fx.Graph]]) -> None:
        self._names, self._made = names, made

    def __getitem__(self, name: str) -> fx.Graph:
        return self._made()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def code_of_model(program: Program) -> RankCode:
    """The code of a model without a pipeline: what was kept with it, else written now."""
    kept = _kept(program)
    if kept is None:
        return RankCode.of_model(program)
    return WrittenCode(program, kept, _gathered(program, kept), lambda: model_graphs(program))


def code_of_stage(program: Program, loss: int | None) -> RankCode:
    """As :func:`code_of_model`, of a pipeline stage; ``loss`` as :class:`RankCode` has it."""
    kept = _kept(program)
    if kept is None:
        return RankCode.of_stage(program, loss)

    def made() -> RankGraphs:
        return stage_graphs(program, backward_steps(program), loss)

    return WrittenCode(program, kept, _gathered(program, kept), made)


def _gathered(program: Program, kept: Mapping[str, Any]) -> dict[str, Gathers]:
    """How whole, resident parameters are gathered: graphs of their own, so that those of the program are not read."""
    shelf = shelf_of(program.graph)
    if not kept["gathered"] or shelf is None or shelf.others is None:
        return {}
    graphs = shelf.others(kept["gathers"])
    return {name: Gathers(graph, *about) for graph, (name, about) in zip(graphs, kept["gathered"].items(), strict=True)}


def axes_of(program: AnyProgram) -> list[str]:
    """The axes over which ranks that run any part of ``program`` communicate, in the same order on all."""
    return sorted({axis for part in _parts(program) for axis in _axes(part)})


def _axes(part: Program) -> list[str]:
    kept = _kept(part)
    return axes_used(part.graphs.values()) if kept is None else kept["axes"]


def _parts(program: AnyProgram) -> Iterator[Program]:
    tail = program.tail if isinstance(program, PipelinedProgram) else None
    for whole in (program, tail):
        yield from whole.parts if whole is not None else ()


def _codes(program: AnyProgram) -> Iterator[tuple[Program, RankGraphs, Any]]:
    """Each part with the graphs that are run, and the targets of its gradients, as :class:`RankCode` has them."""
    if isinstance(program, Program):
        yield program, model_graphs(program), None
        return
    for whole in (program, program.tail) if program.tail is not None else (program,):
        for part in whole.parts:
            steps = backward_steps(part)
            gradients = (steps.at_once, steps.later) if steps is not None else None
            yield part, stage_graphs(part, steps, whole.loss_in(part)), gradients


def _kept(program: Program) -> Mapping[str, Any] | None:
    """What :func:`written` has of ``program``, if its graphs are on a shelf with it and Python is to be run."""
    shelf = shelf_of(program.graph)
    of_role = program.role.graphs.values() if program.role is not None else ()
    is_whole = shelf is not None and all(shelf_of(graph) is shelf for graph in of_role)
    if shelf is None or not shelf.code or not of_role or not is_whole or program.plan.compile != "python":
        return None
    if isinstance(shelf.code, bytes):
        shelf.code = marshal.loads(zlib.decompress(shelf.code))
    table: Mapping[str, Mapping[str, Any]] = shelf.code
    return table.get(_place(program, number_of))
