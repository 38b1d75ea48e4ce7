"""The Python of a program's graphs, compiled once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import fx

from autopar.autodiff.halves import BackwardSteps, backward_steps
from autopar.codegen.python import RankFunction, compile_source, emit
from autopar.ir.collectives import axes_used
from autopar.ir.program import Program
from autopar.runtime.rank_graphs import INFERENCE, RankGraphs, model_graphs, passed_on, stage_graphs
from autopar.weights.resident_parameters import Gathered


class RankCode:
    """The functions of one program, by the names of its graphs.

    ``steps``: those of the backward pass of a pipeline stage. ``resident``: whole parameters that stay in memory,
    bound to a module by the first that runs this code.
    Raises InvariantError where a usual graph cannot be written as Python.
    """

    def __init__(self, program: Program, graphs: RankGraphs, steps: BackwardSteps | None = None) -> None:
        self.program, self.graphs, self.steps = program, graphs, steps
        self.resident: dict[str, Gathered] = {}
        self._functions: dict[str, RankFunction] = {}
        self._with_labels: dict[str, RankFunction] = {}  # of the functions that were profiled
        for name in graphs.usual:
            self.function(name)

    @classmethod
    def of_model(cls, program: Program) -> Self:
        return cls(program, model_graphs(program))

    @classmethod
    def of_stage(cls, program: Program, loss: int | None) -> Self:
        """``loss``: the position of the whole model's loss among the stage's outputs, if it makes it."""
        steps = backward_steps(program)
        return cls(program, stage_graphs(program, steps, loss), steps)

    @property
    def axes(self) -> list[str]:
        """Those over which any rank communicates that runs one of the program's graphs."""
        return axes_used(self.program.graphs.values())

    @property
    def axes_of_inference(self) -> list[str]:
        """Those without which the program gives no output."""
        return axes_used([self.program.graphs.get(INFERENCE, self.program.graph)])

    @property
    def gradients(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Of a stage with a backward pass, the targets of gradients that are due at once, and later."""
        return (self.steps.at_once, self.steps.later) if self.steps is not None else None

    def passed_on(self, name: str) -> Sequence[int]:
        """The positions of results of the graph ``name`` that are inputs, or views of inputs."""
        return passed_on(self.graphs[name])

    def graph(self, name: str) -> fx.Graph:
        return self.graphs[name]

    def function(self, name: str, *, labelled: bool = False) -> RankFunction:
        """``labelled``: it runs what belongs to a module inside a context with its name."""
        known = self._with_labels if labelled else self._functions
        if name not in known:  # a rare one, see RankGraphs
            known[name] = self._compiled(name, labelled)
        return known[name]

    def _compiled(self, name: str, labelled: bool) -> RankFunction:
        if self.program.plan.compile == "inductor":
            from autopar.inductor.functions import regional_function  # it loads Inductor, which takes 2 s

            return regional_function(name, self.graphs[name], self.program, labelled=labelled)
        return compile_source(emit({name: self.graphs[name]}, self.program, labelled=labelled), name)
