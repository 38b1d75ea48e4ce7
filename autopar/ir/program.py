"""The program: a frozen value that describes one parallel model, pipelined or not, and its text form.

A program is an ``fx.Graph`` at the level of ``torch.export`` (linear, attention, cross-entropy whole), the mesh, the
plan, and tables of inputs and outputs. Parameters are placeholders, so a program holds no weights and copies cheaply.
``source`` keeps the graph that all of it was made from, in which no pass has had a hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.errors import InvariantError
from autopar.ir.fast_graph import copied
from autopar.ir.fingerprint import Fingerprint
from autopar.ir.layout import Layout
from autopar.ir.loss import loss_position
from autopar.ir.node import Node, Value, output_node, value
from autopar.ir.stored_graph import Port, border_of, shelf_of
from autopar.ir.tables import Decision, Input, InputKind, Output, OutputKind, Pins, Role
from autopar.ir.text import (
    Lines,
    grad_by_default,
    grad_names,
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
    from autopar.memory.table import MemoryTable


@dataclass(frozen=True)
class _Program:
    """The common part of both kinds of program: a graph on a mesh, its plan, its tables, and the methods for users."""

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
    decisions: Mapping[str, Mapping[str, Decision]] = field(default_factory=dict)  # axis -> node name -> decision
    pins: Pins = field(default_factory=Pins)  # decisions that the passes must keep
    passes: tuple[str, ...] = ()  # names of the passes that made this program
    fingerprint: Fingerprint | None = None  # of the model and the call, once it is compiled
    made_buffers: Mapping[str, Tensor] = field(default_factory=dict)  # that no state dict has, as the model made them
    source: Program | None = None  # the model as it was traced, on one rank, before any pass
    counts: Program | None = None  # of one microbatch: the summands of its ``InputKind.WHOLE``
    joins: Mapping[str, str] = field(default_factory=dict)  # output -> how those of microbatches are joined

    # ------------------------------------------------------------ asking

    def input_of(self, node: Node) -> Input:
        return next(entry for entry in self.inputs if entry.node == node.name)

    def placeholders(self, *kinds: InputKind) -> Iterator[tuple[Node, Input]]:
        """Placeholder nodes of the given kinds with their table entries, in graph order."""
        table = {entry.node: entry for entry in self.inputs}
        for node in self.graph.nodes:
            if node.op == "placeholder" and table[node.name].kind in kinds:
                yield node, table[node.name]

    def takes(self, *kinds: InputKind) -> Iterator[tuple[Port, Input]]:
        """As :meth:`placeholders`, seen from outside: what a rank needs to know of them. A stored graph is not read."""
        table = {entry.node: entry for entry in self.inputs}
        for port in border_of(self.graph).takes:
            if table[port.name].kind in kinds:
                yield port, table[port.name]

    def leaves(self) -> list[tuple[Node, Input]]:
        """What may get a gradient: parameters, then inputs and received values, that require one; in graph order."""
        kinds = (InputKind.PARAMETER, InputKind.INPUT, InputKind.RECEIVED)
        found = [(node, entry) for node, entry in self.placeholders(*kinds) if value(node).requires_grad]
        return sorted(found, key=lambda pair: pair[1].kind is not InputKind.PARAMETER)

    @property
    def returned(self) -> tuple[Node, ...]:
        """The nodes that the graph returns, in the order of ``outputs``."""
        return tuple(output_node(self.graph).args[0])  # type: ignore[arg-type]

    @property
    def returned_types(self) -> tuple[tuple[Value, ...], ...]:
        """The types of :attr:`returned`; a stored graph is not read for them."""
        return border_of(self.graph).returns

    @property
    def loss(self) -> int | None:
        """The position of the loss among the outputs, see :func:`autopar.ir.loss.loss_position`.

        On a pipeline without microbatches all ranks know a loss where all parameters are frozen too, as in evaluation.
        """
        users = [out.kind is OutputKind.USER for out in self.outputs]
        outputs = [types if user else () for user, types in zip(users, self.returned_types)]
        is_whole = self.mesh.is_pipelined and self.plan.microbatches == 1
        any_kind = is_whole and not any(kind.requires_grad for types in outputs for kind in types)
        candidates = [
            any((kind.requires_grad or any_kind and kind.dtype.is_floating_point) and not kind.shape for kind in types)
            for types in outputs
        ]
        return loss_position([out.target for out in self.outputs], candidates)

    @property
    def learns(self) -> bool:
        """Whether there is a loss with a gradient."""
        return self.loss is not None and any(kind.requires_grad for kind in self.returned_types[self.loss])

    @property
    def written_buffers(self) -> frozenset[str]:
        """Those of which forward makes new values."""
        return frozenset(out.target for out in self.outputs if out.kind is OutputKind.BUFFER_UPDATE)

    @property
    def gathers_outputs(self) -> bool:
        """Whether outputs for users are whole on every rank, see :attr:`autopar.plan.Plan.outputs`."""
        without_loss = self.plan.inputs == "global" and self.loss is None
        return self.plan.outputs == "full" or self.plan.outputs == "auto" and without_loss

    @property
    def is_weighed(self) -> bool:
        """Whether the loss of a microbatch is a summand of that of the batch (``weigh_microbatches``)."""
        return bool(self.joins) or any(entry.kind is InputKind.WHOLE for entry in self.inputs)

    # ------------------------------------------------------------ what users call; done by rooms above

    def rank(self, rank: int) -> RankProgram:
        """The program of one rank: ``program.rank(3).code``. Raises ValueError for a rank that is not on the mesh."""
        from autopar.codegen.python import (
            RankProgram,  # from above, as in the three below (tests/test_layering.py)
        )

        assert isinstance(self, AnyProgram)
        self.mesh.coordinates(rank)
        return RankProgram(self, rank)

    def save(self, directory: str | Path) -> None:
        """Write this program to ``directory``, whole or not at all (DESIGN section 7). It holds no weights."""
        from autopar.program_files.program_file import save

        assert isinstance(self, AnyProgram)
        save(self, directory)

    @staticmethod
    def load(directory: str | Path, *, operators: Collection[str] = ()) -> AnyProgram:
        """The program in ``directory``, pipelined or not; no code found there is run.

        ``operators``: of libraries that the caller trusts (``mylib``, ``mylib::scale``).
        Raises ProgramFileError for a damaged one.
        """
        from autopar.program_files.program_file import load

        return load(directory, operators=operators)

    def explain(self, name: str) -> str:
        """Why a node or a parameter (by its name in the model) is laid out as it is, and the cost of the alternatives.

        Raises ValueError for a name that is neither.
        """
        from autopar.analysis.explain import explain

        assert isinstance(self, AnyProgram)
        return explain(self, name)

    def memory(self, optimizer: str = "adamw") -> MemoryTable:
        """What a rank of each pipeline place holds in a training step, and the most at once: nothing is run.

        ``optimizer``: ``"adamw"``, ``"sgd"``, ``"adafactor"``, ... Raises ValueError for one that is not known, and for
        one that cannot update split parameters where there are some; InvariantError for a program that is not
        differentiated.
        """
        from autopar.memory.table import memory_of

        assert isinstance(self, AnyProgram)
        return memory_of(self, optimizer)

    def __str__(self) -> str:
        assert isinstance(self, AnyProgram)
        return format_program(self)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from autopar.analysis.notebook import program_html

        assert isinstance(self, AnyProgram)
        return program_html(self)


@dataclass(frozen=True)
class Program(_Program):
    """One parallel model; or one stage of a pipelined one, on the mesh without ``pp``."""

    role: Role | None = None  # what ranks run, once the program is differentiated

    @property
    def required_role(self) -> Role:
        """The role, which must exist. Raises InvariantError before the program is differentiated."""
        if self.role is None:
            raise InvariantError(
                "the program has no role: it is not differentiated\n"
                "Way out: autopar.compiler.compile_program(...), which makes all of it."
            )
        return self.role

    @property
    def parts(self) -> tuple[Program, ...]:
        """The programs that have roles: this one."""
        return (self,)

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """``""``: its own graph; ``forward``, ``backward``, ``inference``: those of its role."""
        return {"": self.graph, **(self.role.graphs if self.role is not None else {})}

    def clone(self) -> Program:
        """The same program around copies of its graphs, which a pass may then rewrite."""
        role = self.role.clone() if self.role is not None else None
        return replace(self, graph=copied(self.graph), role=role)

    def cut_into(self, stages: Sequence[Program]) -> PipelinedProgram:
        """The pipelined program of this program, which describes one microbatch, and its stages."""
        return PipelinedProgram(**_shared(self), stages=tuple(stages))


@dataclass(frozen=True, kw_only=True)
class PipelinedProgram(_Program):
    """A parallel model on a mesh with ``pp``. Graph and tables are those of one microbatch as a whole, forward only.

    Attributes:
        stages: in the order of the model; each a program on the mesh of one stage, with its own role.
        schedule: in which order pipeline ranks run their stages; None before ``schedule_microbatches``.
        tail: the same for the last microbatches, where these have fewer rows than the first.
    """

    stages: tuple[Program, ...]
    schedule: Schedule | None = None
    tail: PipelinedProgram | None = None

    @property
    def whole(self) -> Program:
        """The program that was cut: of one microbatch, on the whole mesh."""
        return Program(**_shared(self))

    @property
    def parts(self) -> tuple[Program, ...]:
        """The programs that have roles: the stages."""
        return self.stages

    @property
    def required_schedule(self) -> Schedule:
        """The schedule, which must exist. Raises InvariantError before ``schedule_microbatches``."""
        if self.schedule is None:
            raise InvariantError(
                "the program has no schedule: it was not finished\n"
                "Way out: autopar.compiler.compile_program(...), which makes all of it."
            )
        return self.schedule

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """``""``: that of the whole; ``stage 0``, ``stage 0 forward``, ...: those of the stages."""
        found = {"": self.graph}
        for number, stage in enumerate(self.stages):
            found |= {f"stage {number} {name}".rstrip(): graph for name, graph in stage.graphs.items()}
        return found

    def clone(self) -> PipelinedProgram:
        """The same program around copies of its graphs, which a pass may then rewrite."""
        stages = tuple(stage.clone() for stage in self.stages)
        return replace(self, graph=copied(self.graph), stages=stages)

    def loss_in(self, stage: Program) -> int | None:
        """The position of the whole program's loss among the outputs of a stage; None where another stage makes it."""
        if self.loss is None:
            return None
        wanted = self.outputs[self.loss]
        return next((position for position, out in enumerate(stage.outputs) if out == wanted), None)

    def stages_on(self, place: int) -> dict[int, Program]:
        """Number -> stage, for the stages of the pipeline rank ``place``; none before there is a schedule."""
        placement = self.schedule.placement if self.schedule is not None else ()
        return {number: self.stages[number] for number, rank in enumerate(placement) if rank == place}

    def of_rows(self, first: bool) -> PipelinedProgram:
        """The program of a microbatch with ``rows`` rows: as many as the first one has, or fewer."""
        return self if first or self.tail is None else self.tail


AnyProgram = Program | PipelinedProgram


def _shared(program: _Program) -> dict[str, Any]:
    """The fields that programs of both kinds have."""
    return {entry.name: getattr(program, entry.name) for entry in fields(_Program)}


def weight_layouts(program: AnyProgram) -> dict[str, Layout]:
    """Parameter and buffer names, aliases too, with their layouts."""
    return {
        name: port.value.layout
        for port, entry in program.takes(InputKind.PARAMETER, InputKind.BUFFER)
        for name in (entry.target, *entry.aliases)
    }


# ---------------------------------------------------------------- programs


def format_program(program: AnyProgram, *, origins: bool = False, form: Callable[..., Lines] = Lines) -> str:
    """The text form of ``program``; ``origins`` ends each line with the module path and source line it comes from.

    ``form`` makes what formats its graphs, from mesh, gradients and ``origins`` as :class:`autopar.ir.text.Lines` is.

    Values of constants, the plan, input and output structures are not part of it: see
    :mod:`autopar.program_files.program_file`.
    """
    sections = list(_program_sections(program, "program", origins, form))
    if program.counts is not None:
        sections += _program_sections(program.counts, "counts", origins, form)
    if isinstance(program, PipelinedProgram):
        for number, stage in enumerate(program.stages):
            sections += _program_sections(stage, f"stage {number} of {len(program.stages)}", origins, form)
        if program.schedule is not None:
            sections.append(format_schedule(program.schedule).rstrip())
        if program.tail is not None:
            sections.append(format_program(program.tail, origins=origins, form=form).replace("program", "tail", 1))
    return "\n\n".join(sections)


def text_digest(program: AnyProgram) -> str:
    """A digest of ``str(program)``; known of a program whose graphs are stored."""
    graphs = list(program.graphs.values())
    shelf = shelf_of(graphs[0])
    if shelf is not None and all(shelf_of(graph) is shelf for graph in graphs):
        return shelf.text
    return hashlib.sha256(str(program).encode()).hexdigest()


def _program_sections(program: AnyProgram, title: str, origins: bool, form: Callable[..., Lines]) -> Iterator[str]:
    """The graph of one program, and those of its role."""
    table = {entry.node: entry for entry in program.inputs}
    inputs = [table.get(node.name) for node in placeholders(program.graph)]
    gradients = grad_by_default if needs_gradients(program.graph, inputs) else no_grad_by_default
    lines = form(program.mesh, gradients, origins)
    heading = f"{title} {program.mesh}" + (" nograd" if gradients is no_grad_by_default else "")
    yield lines.section(heading, program.graph, inputs, [output_label(entry) for entry in program.outputs])
    if isinstance(program, Program) and program.role is not None:
        yield from _role_sections(program.role, program, inputs, form(program.mesh, None, origins))


def _role_sections(role: Role, program: AnyProgram, inputs: Sequence[Input | None], lines: Lines) -> Iterator[str]:
    outputs = [output_label(entry) for entry in program.outputs]
    yield lines.section("forward:", role.forward, inputs, [*outputs, *["saved "] * role.saved])
    if role.backward is not None:
        names = grad_names(program.outputs)
        given = ["saved"] * role.saved + [f"grad {names[position]}" for position in role.differentiable]
        yield lines.section("backward:", role.backward, given, [f"{quoted(target)}=" for target in role.grads])
    yield lines.section("inference:", role.inference, inputs, outputs)
