"""The program: a frozen value that says everything about one parallel model, and its text form.

A program is an ``fx.Graph`` at the level of ``torch.export`` (linear, attention, cross-entropy whole), the mesh, the
plan, and tables of inputs and outputs. Parameters are placeholders, so a program holds no weights and copies cheaply.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.errors import InvariantError
from autopar.ir.layout import Layout
from autopar.ir.loss import loss_position
from autopar.ir.node import Node, output_node, value, values
from autopar.ir.tables import Decision, Input, InputKind, Output, OutputKind, Pins, Role
from autopar.ir.text import (
    Lines,
    grad_by_default,
    grad_name,
    needs_gradients,
    no_grad_by_default,
    output_label,
    placeholders,
    quoted,
)
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.schedules.instructions import Schedule
from autopar.schedules.text import format_schedule

if TYPE_CHECKING:
    from autopar.codegen.python import RankProgram


def weight_layouts(program: Program) -> dict[str, Layout]:
    """Parameter and buffer names, aliases too, with their layouts."""
    return {
        name: value(node).layout
        for node, entry in program.placeholders(InputKind.PARAMETER, InputKind.BUFFER)
        for name in (entry.target, *entry.aliases)
    }


@dataclass(frozen=True)
class Program:
    """One parallel model. With an axis ``pp`` it is of one microbatch, and cut into ``stages``: each a program on the
    rest of the mesh, with its own role. ``remainder`` is that of the last microbatches, where these are smaller."""

    graph: fx.Graph
    mesh: Mesh
    plan: Plan
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    in_spec: pytree.TreeSpec | None = None  # of (args, kwargs)
    out_spec: pytree.TreeSpec | None = None
    static_inputs: tuple[tuple[int, Any], ...] = ()  # flat positions of inputs that are not tensors, and their values
    static_outputs: tuple[tuple[int, Any], ...] = ()  # the same for outputs (None, numbers)
    role: Role | None = None  # what ranks run, once the program is differentiated
    decisions: Mapping[str, Mapping[str, Decision]] = field(default_factory=dict)  # axis -> node name -> what
    pins: Pins = field(default_factory=Pins)  # what the passes have to keep
    passes: tuple[str, ...] = ()  # names of the passes that made this program
    stages: tuple[Program, ...] = ()  # in the order of the model
    schedule: Schedule | None = None  # in which order pipeline ranks run their stages
    remainder: Program | None = None

    def clone(self) -> Program:
        """The same program around copies of its graphs, which a pass may then rewrite."""
        return replace(
            self,
            graph=copy.deepcopy(self.graph),
            role=self.role.clone() if self.role is not None else None,
            stages=tuple(stage.clone() for stage in self.stages),
        )

    def input_of(self, node: Node) -> Input:
        return next(entry for entry in self.inputs if entry.node == node.name)

    def placeholders(self, *kinds: InputKind) -> Iterator[tuple[Node, Input]]:
        """Placeholder nodes of the given kinds with their table entries, in graph order."""
        table = {entry.node: entry for entry in self.inputs}
        for node in self.graph.nodes:
            if node.op == "placeholder" and table[node.name].kind in kinds:
                yield node, table[node.name]

    @property
    def returned(self) -> tuple[Node, ...]:
        """The nodes that the graph returns, in the order of ``outputs``."""
        return tuple(output_node(self.graph).args[0])  # type: ignore[arg-type]

    @property
    def loss(self) -> int | None:
        """The position of the loss among the outputs, see :func:`autopar.ir.loss.loss_position`."""
        candidates = [
            out.kind is OutputKind.USER and any(kind.requires_grad and not kind.shape for kind in values(node))
            for out, node in zip(self.outputs, self.returned)
        ]
        return loss_position([out.target for out in self.outputs], candidates)

    def loss_in(self, stage: Program) -> int | None:
        """The position of the whole program's loss among the outputs of a stage; None where another one makes it."""
        if self.loss is None:
            return None
        wanted = self.outputs[self.loss]
        return next((position for position, out in enumerate(stage.outputs) if out == wanted), None)

    def of_rows(self, first: bool) -> Program:
        """The program of a microbatch that has as many rows as the first one, or fewer."""
        return self if first or self.remainder is None else self.remainder

    @property
    def required_role(self) -> Role:
        """The role, where there has to be one. Raises InvariantError before the program is differentiated."""
        if self.role is None:
            raise InvariantError(
                "the program has no role: it is not differentiated\n"
                "Way out: autopar.compiler.compile_program(...), which makes all of it."
            )
        return self.role

    def rank(self, rank: int) -> RankProgram:
        """What one rank runs: ``program.rank(3).code``. Raises ValueError for a rank that is not on the mesh."""
        from autopar.codegen.python import RankProgram  # stands above, as in the three below (tests/test_layering.py)

        self.mesh.coordinates(rank)
        return RankProgram(self, rank)

    def save(self, directory: str | Path) -> None:
        """Write this program to ``directory``, whole or not at all (DESIGN section 7). Holds no weights."""
        from autopar.exporters.program_file import save

        save(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Program:
        """The program in ``directory``; runs no code found there. Raises ProgramFileError for a damaged one."""
        from autopar.exporters.program_file import load

        return load(directory)

    def explain(self, name: str) -> str:
        """Why a node or a parameter (by its name in the model) lies as it does, and what the alternatives cost.

        Raises ValueError for a name that is neither.
        """
        from autopar.analysis.explain import explain

        return explain(self, name)

    def __str__(self) -> str:
        return format_program(self)


# ---------------------------------------------------------------- programs


def format_program(program: Program, *, origins: bool = False) -> str:
    """The text form of ``program``; ``origins`` ends each line with the module path and source line it comes from.

    Values of constants, the plan, input and output structures are not part of it: see
    :mod:`autopar.exporters.program_file`.
    """
    sections = list(_program_sections(program, "program", origins))
    for number, stage in enumerate(program.stages):
        sections += _program_sections(stage, f"stage {number} of {len(program.stages)}", origins)
    if program.schedule is not None:
        sections.append(format_schedule(program.schedule).rstrip())
    if program.remainder is not None:
        sections.append(format_program(program.remainder, origins=origins).replace("program", "remainder", 1))
    return "\n\n".join(sections)


def _program_sections(program: Program, title: str, origins: bool) -> Iterator[str]:
    """The graph of one program, and those of its role."""
    table = {entry.node: entry for entry in program.inputs}
    inputs = [table.get(node.name) for node in placeholders(program.graph)]
    gradients = grad_by_default if needs_gradients(program.graph, inputs) else no_grad_by_default
    lines = Lines(program.mesh, gradients, origins)
    heading = f"{title} {program.mesh}" + (" nograd" if gradients is no_grad_by_default else "")
    yield lines.section(heading, program.graph, inputs, [output_label(entry) for entry in program.outputs])
    if program.role is not None:
        yield from _role_sections(program.role, program, inputs, Lines(program.mesh, None, origins))


def _role_sections(role: Role, program: Program, inputs: Sequence[Input | None], lines: Lines) -> Iterator[str]:
    outputs = [output_label(entry) for entry in program.outputs]
    yield lines.section("forward:", role.forward, inputs, [*outputs, *["saved "] * role.saved])
    if role.backward is not None:
        given = ["saved"] * role.saved + [f"grad {grad_name(program.outputs, i)}" for i in role.differentiable]
        yield lines.section("backward:", role.backward, given, [f"{quoted(target)}=" for target in role.grads])
    yield lines.section("inference:", role.inference, inputs, outputs)
