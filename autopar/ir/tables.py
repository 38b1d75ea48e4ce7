"""The tables of a program: its placeholders and results, its role, the decisions made and the pinned ones."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopar.ir.fast_graph import copied
from autopar.ir.layout import Layout

SUM, SAME, MIXED = "sum", "same", "mixed"  # how microbatches join an output; else the number of the dim of its rows
SHARE = "share"  # float64: the rows of a microbatch among those of the batch


class InputKind(enum.Enum):
    PARAMETER = "param"
    BUFFER = "buffer"
    CONSTANT = "const"
    INPUT = "input"
    WHOLE = "whole"  # of a microbatch: a sum over the whole batch, by its number, or SHARE
    SEED = "seed"  # int64 scalar from which dropout masks are drawn, a new one each step
    RECEIVED = "recv"  # of a pipeline stage: a value of another one


class OutputKind(enum.Enum):
    USER = "output"
    BUFFER_UPDATE = "update"  # the new value of a buffer (batch_norm statistics)
    SENT = "send"  # of a pipeline stage: for another one


@dataclass(frozen=True)
class Input:
    """One placeholder.

    ``target``: parameter, buffer or constant name, or the path of a user input (``labels``); for a received value, the
    stage that makes it and its name there (``0.add_3``).
    """

    node: str
    kind: InputKind
    target: str
    aliases: tuple[str, ...] = ()  # further names of a tied parameter

    @property
    def names(self) -> tuple[str, ...]:
        """All names of a tensor of the model: ``target`` first."""
        return (self.target, *self.aliases)


@dataclass(frozen=True)
class Output:
    """One returned value.

    ``target``: the buffer's name, or the path in the model's output (``loss``); for a sent value, the stage that takes
    it and its name (``1.add_3``).
    """

    kind: OutputKind
    target: str


def join_key(entry: Output) -> str:
    """The key of an output in ``Program.joins``: a buffer that is written may be called as an output is."""
    return entry.target if entry.kind is OutputKind.USER else f"{entry.kind.value} {entry.target}"


@dataclass(frozen=True)
class Decision:
    """The decision for one node on one axis.

    ``alternatives``: the extra cost of each, in seconds a step, or why it was not possible. ``stage``: on the axis
    ``pp``, the pipeline stage that computes the node.
    """

    chosen: str
    alternatives: Mapping[str, float | str] = field(default_factory=dict)
    stage: int | None = None


@dataclass(frozen=True)
class Routed(Decision):
    """Experts of which each token chooses some, in ``decisions["experts"]``. ``chosen``: how the model writes them.

    Attributes:
        module: of the model, as a dotted path.
        experts: how many there are.
        choices: how many each token chooses.
        products: the nodes that multiply rows with the matrices of their experts.
    """

    module: str = ""
    experts: int = 0
    choices: int = 0
    products: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unrouted(Decision):
    """Experts that run for every token though each token chooses some; ``alternatives`` say why.

    Attributes:
        module: of the model, as a dotted path.
        source: the line of the model that is in the way, or the one that chooses.
        reason: why it is in the way.
    """

    module: str = ""
    source: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Pins:
    """Decisions that the passes must keep, since they were made earlier.

    Attributes:
        layouts: of parameters and buffers by name, aliases too: the ranks hold them so already.
        dtypes: node name -> dtype at the border of a parameter or an input, where the graph computes in another.
        stages: node name -> pipeline stage, so that parameters stay where another program has put them.
        homes: parameter or buffer -> the pipeline stages that hold it already, for a program of other nodes.
        choices: axis -> node name -> the decision that another program of this model has, for batches of other sizes.
        of_rows: gives the model traced for another number of rows, as it is before a batch is weighed.
    """

    layouts: Mapping[str, Layout] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    stages: Mapping[str, int] = field(default_factory=dict)
    homes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    of_rows: Callable[[int], Any] | None = None


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

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """The existing graphs by name."""
        found = {"forward": self.forward, "backward": self.backward, "inference": self.inference}
        return {name: graph for name, graph in found.items() if graph is not None}

    def clone(self) -> Role:
        made = {id(graph): copied(graph) for graph in self.graphs.values()}  # inference may be forward itself
        forward, backward, inference = (made.get(id(g)) for g in (self.forward, self.backward, self.inference))
        assert forward is not None and inference is not None
        return replace(self, forward=forward, backward=backward, inference=inference)
