"""What a block and the rest of a model cost on one rank: programs of two depths differ by what a block costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.analysis.footprint import sent
from autopar.compiler import finish_program, place
from autopar.cost.roofline import Costs
from autopar.errors import AutoparError
from autopar.fitting.shallow import Depth, depth_of, shallow
from autopar.frontend.trace import trace
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import values
from autopar.ir.program import Program
from autopar.ir.traffic import bytes_of
from autopar.memory.table import RankMemory, memory_of
from autopar.mesh import Mesh
from autopar.plan import Plan

ROWS = 2  # of the batch that is priced: a model may look otherwise with one
SHALLOW = (2, 3)

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Numbers:
    """Of a block, or of all that is not in blocks, for one row on one rank; bytes, seconds of forward and backward."""

    parameters: float
    activations: float
    seconds: float
    sent: float

    def __sub__(self, other: Numbers) -> Numbers:
        pairs = zip(vars(self).values(), vars(other).values())
        return Numbers(*(here - there for here, there in pairs))

    def times(self, count: float) -> Numbers:
        return Numbers(*(count * number for number in vars(self).values()))


@dataclass(frozen=True)
class Price:
    """``working``: bytes at the peak of a row beside parameters, kept activations and gradients. ``crossing``: bytes
    that one block passes to the next, of a row."""

    block: Numbers
    rest: Numbers
    working: float
    crossing: float
    dtype: torch.dtype


class Prices:
    """Of one model and length, for each way of splitting its layers; ``batch_of`` makes batches of some rows."""

    def __init__(self, model: nn.Module, batch_of: Callable[[int], Batch], plan: Plan) -> None:
        self.model, self.batch_of = model, batch_of
        self.plan = replace(plan, check_numerics=False, on_indivisible="error", microbatches=1, zero=0)
        self._traces: dict[tuple[int, int], Program] = {}
        self._known: dict[Any, Price | str] = {}

    @cached_property
    def depth(self) -> Depth:
        return depth_of(self.model)

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of most parameters."""
        sizes: Counter[torch.dtype] = Counter()
        for parameter in self.model.parameters():
            sizes[parameter.dtype] += parameter.numel()
        return sizes.most_common(1)[0][0]

    @property
    def blocks(self) -> int:
        return max(1, self.depth.blocks)

    def traced(self, blocks: int, rows: int) -> Program:
        """The model with so many blocks, before any pass."""
        if (blocks, rows) not in self._traces:
            model = shallow(self.model, self.depth, blocks)
            self._traces[blocks, rows] = trace(model, (), self.batch_of(rows), plan=self.plan)
        return self._traces[blocks, rows]

    def of(self, mesh: Mesh, plan: Plan) -> Price | str:
        """The price on a mesh of ``tp`` and ``sp``; or why the model cannot be split so."""
        key = (mesh.axes, plan.sequence, plan.recompute)
        if key not in self._known:
            try:
                self._known[key] = self._price(mesh, plan)
            except (AutoparError, ValueError) as problem:
                self._known[key] = str(problem).strip().splitlines()[0]
        return self._known[key]

    def _price(self, mesh: Mesh, plan: Plan) -> Price:
        plan = replace(self.plan, sequence=plan.sequence, recompute=plan.recompute, bucket_mb=0, overlap_mb=0)
        if not self.depth.blocks:
            whole, found, crossing = self._numbers(1, mesh, plan)
            return Price(Numbers(0, 0, 0, 0), whole, _working(found), crossing, self.dtype)
        few, _, _ = self._numbers(SHALLOW[0], mesh, plan)
        more, found, crossing = self._numbers(SHALLOW[1], mesh, plan)
        block = more - few
        return Price(block, few - block.times(SHALLOW[0]), _working(found), crossing, self.dtype)

    def _numbers(self, blocks: int, mesh: Mesh, plan: Plan) -> tuple[Numbers, RankMemory, float]:
        split = place(self.traced(blocks, ROWS), mesh, plan)
        assert isinstance(split, Program)
        costs = Costs(split)
        seconds = sum(costs.both(node) for node in split.graph.nodes if node.op == "call_function")
        finished = finish_program(split)
        found = memory_of(finished, "sgd", timeline=False).largest
        moved = sum(one.bytes for one in sent(finished))
        numbers = Numbers(found.parameters, found.activations / ROWS, seconds / ROWS, moved / ROWS)
        return numbers, found, _crossing(split) / ROWS


def _working(found: RankMemory) -> float:
    """Of a row: what there is beside parameters, activations and gradients when the step is largest."""
    apart = found.at_peak["working"] + found.at_peak["inputs"] + found.at_peak["gathered"]
    return apart / ROWS


def _crossing(program: Program) -> float:
    """Bytes that go from the first repeated block to later ones, on one rank."""
    blocks = [block_of(node) for node in program.graph.nodes if is_repeated(block_of(node))]
    if not blocks:
        return 0.0
    return float(sum(_bytes(node, program) for node in program.graph.nodes if _leaves(node, blocks[0])))


def _leaves(node: fx.Node, block: str) -> bool:
    others = (block_of(user) for user in node.users)
    return block_of(node) == block and any(is_repeated(other) and other != block for other in others)


def _bytes(node: fx.Node, program: Program) -> int:
    return sum(bytes_of(kind, program.mesh) for kind in values(node) if kind.dtype.is_floating_point)


def rows_of(batch: Batch, rows: int) -> Batch:
    """``batch`` with ``rows`` rows, of which only the shapes matter."""
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    known = max(sizes)
    return {
        name: value.new_zeros((rows, *value.shape[1:]))
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == known
        else value
        for name, value in batch.items()
    }
