"""The program: a frozen value that says everything about one parallel model, and the only door to ``node.meta``.

A program is an ``fx.Graph`` at the level of ``torch.export`` (linear, attention, cross-entropy whole), the mesh, the
plan, and tables of inputs and outputs. Parameters are placeholders, so a program holds no weights and copies cheaply.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.layout import Layout
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.signature import loss_position

if TYPE_CHECKING:
    from autopar.emit import RankProgram
    from autopar.schedule import Schedule

Node = fx.Node


class InputKind(enum.Enum):
    PARAMETER = "param"
    BUFFER = "buffer"
    CONSTANT = "const"
    INPUT = "input"
    SEED = "seed"  # int64 scalar from which dropout masks are drawn, a new one each step
    RECEIVED = "recv"  # of a pipeline stage: made by another one


class OutputKind(enum.Enum):
    USER = "output"
    BUFFER_UPDATE = "update"  # the new value of a buffer (batch_norm statistics)
    SENT = "send"  # of a pipeline stage: for another one


@dataclass(frozen=True)
class Input:
    """One placeholder. ``target``: parameter, buffer or constant name, the path of a user input (``labels``), or for
    what is received the stage that makes it and the name there (``0.add_3``)."""

    node: str
    kind: InputKind
    target: str
    aliases: tuple[str, ...] = ()  # further names of a tied parameter


@dataclass(frozen=True)
class Output:
    """One returned value. ``target``: the buffer's name, the path in the model's output (``loss``), or for what is
    sent the stage that takes it and the name (``1.add_3``)."""

    kind: OutputKind
    target: str


@dataclass(frozen=True)
class Value:
    """The type of one tensor in the graph: global shape and layout, dtype, and whether gradients flow through it."""

    dtype: torch.dtype
    layout: Layout
    requires_grad: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape


@dataclass(frozen=True)
class Origin:
    """Where a node comes from in the user's model."""

    module: str = ""  # dotted path, e.g. model.layers.0.mlp
    source: str = ""  # "file.py:12 in forward: x = self.up(x)"


@dataclass(frozen=True)
class Decision:
    """What was decided of one node on one axis. ``alternatives``: what each would cost more, in seconds a step, or why
    it was not possible. ``stage``: on the axis ``pp``, which pipeline stage computes the node."""

    chosen: str
    alternatives: Mapping[str, float | str] = field(default_factory=dict)
    stage: int | None = None


@dataclass(frozen=True)
class Role:
    """Graphs that a set of ranks runs alike, up to rank constants. ``saved`` values pass from forward to backward.

    forward:  (inputs) -> (*outputs, *saved);  backward: (*saved, *gradients of differentiable outputs) -> gradients
    in the order of ``grads`` (parameter targets). ``inference``: (inputs) -> outputs, saves nothing.
    """

    forward: fx.Graph
    backward: fx.Graph | None
    inference: fx.Graph
    saved: int = 0
    differentiable: tuple[int, ...] = ()  # positions among the outputs
    grads: tuple[str, ...] = ()

    def clone(self) -> Role:
        graphs = copy.deepcopy((self.forward, self.backward, self.inference))
        return replace(self, forward=graphs[0], backward=graphs[1], inference=graphs[2])


@dataclass(frozen=True)
class Program:
    """One parallel model. With an axis ``pp`` it is of one microbatch, and cut into ``stages``: each a program on the
    rest of the mesh, with roles of its own. ``remainder`` is that of the last microbatches, where these are smaller."""

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
    roles: tuple[Role, ...] = ()
    decisions: Mapping[str, Mapping[str, Decision]] = field(default_factory=dict)  # axis -> node name -> what
    settled: Mapping[str, Layout] = field(default_factory=dict)  # parameter layouts that the passes have to keep
    given: Mapping[str, torch.dtype] = field(default_factory=dict)  # node name -> dtype of a tensor yet to be cast
    passes: tuple[str, ...] = ()  # names of the passes that made this program
    stages: tuple[Program, ...] = ()  # in the order of the model
    schedule: Schedule | None = None  # in which order pipeline ranks run their stages
    settled_stages: Mapping[str, int] = field(default_factory=dict)  # node name -> stage, which the cut has to keep
    remainder: Program | None = None

    def clone(self) -> Program:
        """The same program around copies of its graphs, which a pass may then rewrite."""
        return replace(
            self,
            graph=copy.deepcopy(self.graph),
            roles=tuple(role.clone() for role in self.roles),
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
        """The position of the loss among the outputs, see :func:`autopar.signature.loss_position`."""
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

    def role_of(self, rank: int) -> Role:
        """The role that ``rank`` plays; its graphs exist once the program is differentiated."""
        self.mesh.coordinates(rank)
        (role,) = self.roles
        return role

    def rank(self, rank: int) -> RankProgram:
        """What one rank runs: ``program.rank(3).code``. Raises ValueError for a rank that is not on the mesh."""
        from autopar.emit import RankProgram  # the emitter stands above the program

        self.mesh.coordinates(rank)
        return RankProgram(self, rank)

    def save(self, directory: str | Path) -> None:
        """Write this program to ``directory``, whole or not at all (DESIGN section 7). Holds no weights."""
        from autopar.program_file import save  # stands above the program

        save(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Program:
        """The program in ``directory``; runs no code found there. Raises ProgramFileError for a damaged one."""
        from autopar.program_file import load

        return load(directory)

    def explain(self, name: str) -> str:
        """Why a node or a parameter (by its name in the model) lies as it does, and what the alternatives cost.

        Raises ValueError for a name that is neither.
        """
        from autopar.explain import explain  # stands above the program

        return explain(self, name)

    def __str__(self) -> str:
        from autopar.text import format_program  # the text form stands above the program

        return format_program(self)


_VALUES, _ORIGIN = "autopar_values", "autopar_origin"


def output_node(graph: fx.Graph) -> Node:
    found: Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return found


def values(node: Node) -> tuple[Value, ...]:
    """The types of the tensors that ``node`` returns (several for split, topk, ...; () before they are known)."""
    found: tuple[Value, ...] = node.meta.get(_VALUES, ())
    return found


def value(node: Node) -> Value:
    """The type of the one tensor that ``node`` returns."""
    (only,) = values(node)
    return only


def set_values(node: Node, *types: Value) -> None:
    node.meta[_VALUES] = types


def origin(node: Node) -> Origin:
    found: Origin = node.meta.get(_ORIGIN, Origin())
    return found


def set_origin(node: Node, where: Origin) -> None:
    node.meta[_ORIGIN] = where


def clear_meta(node: Node) -> None:
    """Drop everything torch left in ``node.meta``; ours is set by :func:`set_values` and :func:`set_origin`."""
    node.meta = {key: item for key, item in node.meta.items() if key in (_VALUES, _ORIGIN)}


def traced_value(node: Node) -> Any:
    """What torch's tracer recorded as the (fake) value of ``node``: a tensor, a tuple of tensors, or None."""
    return node.meta.get("val")


def traced_origin(node: Node) -> Origin:
    """The module path and source line that torch's tracer recorded for ``node``."""
    stack = node.meta.get("nn_module_stack") or {}
    module = [path for path, _ in stack.values()][-1] if stack else ""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    if len(lines) < 2 or '"' not in lines[-2]:
        return Origin(module)
    file, rest = lines[-2].split('"')[1], lines[-2].split('"')[2]
    where = rest.strip(", ").replace("line ", "", 1).replace(", in ", " in ", 1)
    return Origin(module, f"{file.rsplit('/', 1)[-1]}:{where}: {lines[-1]}")
