"""The programs of one parallel module, by kind of call: compiled, agreed on by the ranks, bound; the oldest goes."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping

import torch

from autopar.ir.layout import Layout
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.runtime.accumulate import Accumulation
from autopar.runtime.calls import Call, global_call, shapes
from autopar.runtime.execute import Executable
from autopar.runtime.execute_pipeline import PipelineExecutable
from autopar.runtime.given_programs import GivenPrograms
from autopar.runtime.local_parts import check_parts, check_parts_of_ranks, explained
from autopar.runtime.parameters import Weights

PROGRAMS_KEPT = 8

Compile = Callable[[Call, Mapping[str, Layout] | None], AnyProgram]  # (whole call, layouts of weights) ->
Bound = Executable | PipelineExecutable

logger = logging.getLogger("autopar")


class ProgramCache:
    """The cache.

    ``weights`` are laid out by the first program. ``packs_padding``: whether the model has layers that compute
    otherwise where no gradient is required. ``given``: programs that need not be compiled.
    """

    def __init__(
        self,
        compiled: Compile,
        mesh: Mesh,
        plan: Plan,
        weights: Weights,
        accumulation: Accumulation,
        packs_padding: bool = False,
        given: GivenPrograms | None = None,
    ) -> None:
        self._compiled, self._mesh, self._plan = compiled, mesh, plan
        self._weights, self._connection = weights, weights.connection
        self._accumulation, self._packs_padding, self._given = accumulation, packs_padding, given
        self._programs: OrderedDict[Hashable, AnyProgram] = OrderedDict()  # the latest used last
        self._bound: dict[Hashable, Bound] = {}

    def __len__(self) -> int:
        return len(self._programs)

    @property
    def latest(self) -> AnyProgram | None:
        """The program of the latest kind of call; before there was a call, the first that was given."""
        first = self._given.programs[0] if self._given is not None else None
        return next(reversed(self._programs.values()), first)

    @property
    def latest_bound(self) -> Bound | None:
        """The bound program of :attr:`latest`; None before it has run."""
        return self._bound.get(next(reversed(self._programs), None))

    def clear(self) -> None:
        self._programs.clear()
        self._bound.clear()

    def prepared(self, call: Call, training: bool) -> AnyProgram:
        """The program of a call on this rank; it is compiled if there is none."""
        whole = global_call(call, self._mesh, self._plan)
        with explained(call, whole, self._mesh, self._plan):
            return self._program(self._kind(call, training), whole, training)

    def of_whole(self, call: Call, training: bool) -> AnyProgram:
        """The program of a call that has the whole batch, whatever ``plan.inputs`` says."""
        return self._program((self._kind(call, training), "whole"), call, training)

    def bound(self, call: Call, training: bool) -> Bound:
        """The bound program of this call on this rank.

        Collective for a new kind of call. Raises the errors of the compiler, and LaunchError where ranks have different
        programs.
        """
        kind = self._kind(call, training)
        found = self._bound.get(kind)
        if found is not None:
            self._programs.move_to_end(kind)
            return found
        connection = self._connection
        assert connection is not None
        if self._plan.inputs == "local":
            check_parts_of_ranks(call, connection, self._plan)
        program = self.prepared(call, training)
        check_parts(program, call)
        connection.agree(program)
        if isinstance(program, PipelinedProgram):
            found = PipelineExecutable(program, self._weights.root, connection)
        else:
            found = Executable(program, self._weights.root, connection, self._accumulation)
        self._bound[kind] = found
        return found

    def _kind(self, call: Call, training: bool) -> Hashable:
        packs = self._packs_padding and not torch.is_grad_enabled()
        return training, cast_to(), self._weights.requires_grad(), packs, call.key

    def _program(self, kind: Hashable, call: Call, training: bool) -> AnyProgram:
        if kind in self._programs:
            return self._programs[kind]
        program = self._given.of(call) if self._given is not None else None
        if program is None and (self._connection is None or self._connection.rank == 0):
            self._tell(call, training)
        while len(self._programs) >= PROGRAMS_KEPT:
            oldest, _ = self._programs.popitem(last=False)
            self._bound.pop(oldest, None)
        if program is None:
            with self._weights.traceable():
                program = self._compiled(call, self._weights.layouts)
        self._weights.lay_out(program)  # before it is kept: a program that requires other layouts never runs
        self._programs[kind] = program
        return program

    def _tell(self, call: Call, training: bool) -> None:
        """Say once for each kind of call that, and why, it is compiled, where that was not to be expected."""
        name = "training" if training else "evaluation"
        if self._given is not None:
            logger.warning("making another program: %s", self._given.none_of(call))
        elif self._programs:
            logger.warning("a new kind of call (%s, inputs %s): making another program", name, shapes(call.tensors))


def cast_to() -> tuple[torch.dtype | None, ...]:
    """The dtype in which autocast computes; a traced program has its casts as nodes."""
    kinds = ("cpu", "cuda")
    return tuple([torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds])
