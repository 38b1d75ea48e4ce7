"""The policy of an axis that splits the batch: inputs on their batch dim, and what depends on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autopar.errors import IndivisibleError
from autopar.ir.batch import batch_dims
from autopar.ir.layout import INVARIANT, Placement, Split
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.tables import Input, InputKind
from autopar.rules import Rule
from autopar.rules.factoring import Strategy
from autopar.split.choose import NO_RULES
from autopar.split.flow import Flow, Key


def batch_policy(program: Program, axis: str) -> BatchPolicy:
    """The policy of ``axis``. Raises IndivisibleError if the batch does not divide by it."""
    return BatchPolicy(axis, _batch_dims(program, axis))


def _batch_dims(program: Program, axis: str) -> dict[str, int]:
    """Node name of each input -> its batch dim.

    Raises IndivisibleError if the batch does not divide by the axis.
    """
    ways = program.mesh.size(axis)
    inputs = list(program.placeholders(InputKind.INPUT))
    shapes = [(entry.target, value(node).layout.local_shape(program.mesh)) for node, entry in inputs]
    found: dict[str, int] = {}
    for (node, _), (target, shape), dim in zip(inputs, shapes, batch_dims(shapes, program.plan.batch_dims)):
        if dim is None:
            continue
        if shape[dim] % ways:
            raise IndivisibleError(
                f"the batch of input '{target}' has {shape[dim]} rows (dim {dim}), which {axis}={ways} does not divide;"
                f" give a batch size that is a multiple of {ways}, or a mesh with another {axis}"
            )
        found[node.name] = dim
    return found


@dataclass(frozen=True)
class BatchPolicy:
    """``dims``: node name of each input -> its batch dim."""

    axis: str
    dims: Mapping[str, int]
    rules: ClassVar[Mapping[Any, Rule]] = NO_RULES

    def seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        for node, _ in flow.program.placeholders(InputKind.INPUT):
            if node.name in self.dims:
                yield (node, 0), Split(self.dims[node.name])

    def further_seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        return ()

    def may_gather(self, flow: Flow, key: Key) -> bool:
        return True

    def placements(self, flow: Flow, node: fx.Node, entry: Input) -> list[Placement]:
        if node.name not in self.dims or self._is_wanted_whole(flow, node, entry):
            return [INVARIANT]
        return [Split(self.dims[node.name])]

    def _is_wanted_whole(self, flow: Flow, node: fx.Node, entry: Input) -> bool:
        """Whether no user can take a part of this input, which every rank gets whole (offsets of bags)."""
        if flow.program.plan.inputs != "global" or entry.target in flow.program.plan.batch_dims:
            return False
        split = Split(self.dims[node.name])
        uses = flow.uses.get((node, 0), [])
        taken = any(s.inputs[i] == split for call, i in uses for s in flow.parts.get(call, {}).values())
        return bool(uses) and not taken

    def allowed(self, flow: Flow, call: fx.Node, strategies: list[Strategy]) -> list[Strategy]:
        """Every call that can be split by batch is split."""
        return [s for s in strategies if s.part] or strategies
