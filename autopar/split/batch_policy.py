"""The policy of an axis that splits the batch: inputs on their batch dim, and what depends on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from autopar.ir.batch import input_rows, is_padded, pads_rows
from autopar.ir.layout import INVARIANT, Placement, Split
from autopar.ir.program import Program
from autopar.ir.tables import Input
from autopar.rules import Rule
from autopar.rules.factoring import Strategy
from autopar.split.choose import NO_RULES
from autopar.split.flow import Flow, Key


def batch_policy(program: Program, axis: str) -> BatchPolicy:
    """The policy of ``axis``."""
    if is_padded(program):  # every rank gets all rows, and takes those of its part with their copies
        return BatchPolicy(axis, {}, {node.name: dim for node, dim in pads_rows(program)})
    dims = {node.name: dim for node, dim in input_rows(program).items()}
    return BatchPolicy(axis, dims, dims)


@dataclass(frozen=True)
class BatchPolicy:
    """``dims``: node name of each input -> its batch dim; ``sources``: the same of all nodes that make rows."""

    axis: str
    dims: Mapping[str, int]
    sources: Mapping[str, int]
    rules: ClassVar[Mapping[Any, Rule]] = NO_RULES

    def seeds(self, flow: Flow) -> Iterable[tuple[Key, Split]]:
        for node in flow.program.graph.nodes:
            if node.name in self.sources:
                yield (node, 0), Split(self.sources[node.name])

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
