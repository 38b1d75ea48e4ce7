"""The Python of a family of programs, compiled once for all sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import fx

from autopar.autodiff.halves import BackwardSteps
from autopar.codegen.python import RankFunction, compile_source, emit_sized
from autopar.families.family import Family
from autopar.families.walk import evaluated_graph
from autopar.ir.program import PipelinedProgram, Program
from autopar.runtime.rank_code import RankCode
from autopar.runtime.rank_graphs import RankGraphs


class SizedCode(RankCode):
    """The functions of a family's template: each takes the sizes after comm and inputs, see :class:`MemberCode`."""

    def __init__(self, program: Program, graphs: RankGraphs, steps: BackwardSteps | None = None) -> None:
        self.expressions: dict[tuple[str, bool], tuple[Any, ...]] = {}  # (function, labelled) -> the sizes it takes
        super().__init__(program, graphs, steps)

    def _compiled(self, name: str, labelled: bool) -> RankFunction:
        if self.program.plan.compile == "inductor":
            from autopar.inductor.functions import regional_sized  # it loads Inductor, which takes 2 s

            function, sizes = regional_sized(name, self.graphs[name], self.program, labelled=labelled)
            self.expressions[name, labelled] = sizes
            return function
        source, expressions = emit_sized(name, self.graphs[name], self.program, labelled=labelled)
        self.expressions[name, labelled] = expressions[name]
        return compile_source(source, name)


class MemberCode(RankCode):
    """The code of a family for one batch: ``numbers`` are the values of the family's expressions."""

    def __init__(self, family: SizedCode, numbers: Mapping[Any, Any]) -> None:
        self._family, self._numbers = family, numbers
        self._evaluated: dict[str, fx.Graph] = {}
        self._bound: dict[tuple[str, bool], RankFunction] = {}
        self.program, self.graphs, self.steps = family.program, family.graphs, family.steps
        self.resident = family.resident

    def graph(self, name: str) -> fx.Graph:
        if name not in self._evaluated:
            self._evaluated[name] = evaluated_graph(self.graphs[name], self._numbers)
        return self._evaluated[name]

    def function(self, name: str, *, labelled: bool = False) -> RankFunction:
        key = name, labelled
        if key not in self._bound:
            function: Any = self._family.function(name, labelled=labelled)
            sizes = tuple([self._numbers[each] for each in self._family.expressions[key]])
            self._bound[key] = partial(function, sizes=sizes) if sizes else function
        return self._bound[key]


class FamilyCode:
    """The code of a family, made as it is needed: of the model, or of each stage (and of those of a smaller tail)."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.agreed = False  # the ranks have found that they have the same
        self._made: dict[tuple[bool, int], SizedCode] = {}

    def of_model(self, numbers: Mapping[Any, Any]) -> RankCode:
        if (True, 0) not in self._made:
            program = self.family.template
            assert isinstance(program, Program)
            self._made[True, 0] = SizedCode.of_model(program)
        return MemberCode(self._made[True, 0], numbers)

    def of_stage(self, numbers: Mapping[Any, Any], is_first: bool, stage: int) -> RankCode:
        """``is_first``: of the rows of the first microbatch, not of a smaller one."""
        if (is_first, stage) not in self._made:
            whole = self.family.template
            assert isinstance(whole, PipelinedProgram)
            whole = whole.of_rows(is_first)
            program = whole.stages[stage]
            self._made[is_first, stage] = SizedCode.of_stage(program, whole.loss_in(program))
        return MemberCode(self._made[is_first, stage], numbers)
