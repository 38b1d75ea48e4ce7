"""What a block and the rest of a model cost on one rank: programs of two depths differ by what a block costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.analysis.experts import routed_regions
from autopar.analysis.footprint import sent_by_activations
from autopar.compiler import finish_program, place
from autopar.cost.machine import ACCELERATOR
from autopar.cost.roofline import Costs
from autopar.errors import AutoparError
from autopar.fitting.meshes import Model
from autopar.fitting.shallow import Depth, depth_of, shallow
from autopar.frontend.trace import trace
from autopar.ir import collectives as comm
from autopar.ir.blocks import block_of, is_repeated
from autopar.ir.node import value, values
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.ir.traffic import bytes_of
from autopar.memory.table import RankMemory, memory_of
from autopar.mesh import EXPERTS, SEQUENCE, TENSOR, Mesh
from autopar.plan import Plan

ROWS = 2  # of the batch that is priced: a model may look otherwise with one
SHALLOW = (2, 3)
SUMS = 4  # all-reduces over tp in forward and backward of a block of a transformer

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Numbers:
    """Of a block, or of all that is not in blocks, for one row on one rank; bytes, seconds of forward and backward.

    Attributes:
        parameters, experts: of one rank, whatever the rows; those of experts that ``ep`` splits are apart.
        activations: that forward keeps for backward.
        seconds: of operators, and of collectives over ``tp``.
        sent: axis -> bytes, without gradients of parameters.
    """

    parameters: float = 0.0
    experts: float = 0.0
    activations: float = 0.0
    seconds: float = 0.0
    sent: Mapping[str, float] = field(default_factory=dict)

    def __sub__(self, other: Numbers) -> Numbers:
        return self.plus(other, -1)

    def plus(self, other: Numbers, times: float) -> Numbers:
        axes = dict.fromkeys((*self.sent, *other.sent))
        return Numbers(
            self.parameters + times * other.parameters,
            self.experts + times * other.experts,
            self.activations + times * other.activations,
            self.seconds + times * other.seconds,
            {axis: self.sent.get(axis, 0.0) + times * other.sent.get(axis, 0.0) for axis in axes},
        )

    def shared(self, tensor: int, sequence: int, experts: int) -> Numbers:
        """About that of a rank where layers, tokens and experts are divided so; what is sent is not known."""
        cut = tensor * sequence
        each = self.parameters / tensor, self.experts / tensor / experts
        return Numbers(*each, self.activations / cut, self.seconds / cut)


@dataclass(frozen=True)
class Price:
    """``working``: bytes at the peak of a row beside parameters, kept activations and gradients. ``crossing``: bytes
    that one block passes to the next, of a row."""

    block: Numbers
    rest: Numbers
    working: float
    crossing: float
    dtype: torch.dtype

    def shared(self, mesh: Mesh) -> Price:
        """A guess of the price on ``mesh`` from that on one rank: everything is divided, over ``tp`` sums are sent."""
        ways = mesh.size(TENSOR), mesh.size(SEQUENCE), mesh.size(EXPERTS)
        cut = ways[0] * ways[1]
        block, rest = self.block.shared(*ways), self.rest.shared(*ways)
        sums = SUMS * 2 * (ways[0] - 1) / ways[0] * self.crossing / ways[1]
        block = replace(block, seconds=block.seconds + sums / ACCELERATOR.link)
        return Price(block, rest, self.working / cut, self.crossing / ways[1], self.dtype)


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

    def traced_call(self, blocks: int, batch: Batch) -> Program:
        """The same for a batch of as many rows."""
        return self.traced(blocks, _rows(batch))

    @cached_property
    def of_model(self) -> Model:
        regions = routed_regions(place(self.traced(SHALLOW[0], ROWS), Mesh(dp=1), self.plan))
        return Model(self.blocks, math.gcd(*(region.experts for region in regions)))

    def traced(self, blocks: int, rows: int) -> Program:
        """The model with so many blocks, before any pass."""
        if (blocks, rows) not in self._traces:
            model = shallow(self.model, self.depth, blocks)
            self._traces[blocks, rows] = trace(model, (), self.batch_of(rows), plan=self.plan)
        return self._traces[blocks, rows]

    def of(self, mesh: Mesh, plan: Plan) -> Price | str:
        """The price on the axes ``ep``, ``sp`` and ``tp`` of a mesh; or why the model cannot be split so."""
        alone = within_stage(mesh)
        key = (alone.axes, plan.sequence, plan.recompute)
        if key not in self._known:
            try:
                self._known[key] = self._price(alone, plan)
            except (AutoparError, ValueError) as problem:
                self._known[key] = str(problem).strip().splitlines()[0]
        return self._known[key]

    def guess(self, mesh: Mesh, plan: Plan) -> Price | str:
        """About the price, from that on one rank; where it is known already, the price."""
        if (within_stage(mesh).axes, plan.sequence, plan.recompute) in self._known:
            return self.of(mesh, plan)
        one = self.of(Mesh(), replace(plan, sequence="none"))
        return one.shared(mesh) if isinstance(one, Price) else one

    def _price(self, mesh: Mesh, plan: Plan) -> Price:
        plan = replace(self.plan, sequence=plan.sequence, recompute=plan.recompute, bucket_mb=0, overlap_mb=0)
        if not self.depth.blocks:
            whole, found, crossing = self._numbers(1, mesh, plan)
            return Price(Numbers(), whole, _working(found), crossing, self.dtype)
        few, _, _ = self._numbers(SHALLOW[0], mesh, plan)
        more, found, crossing = self._numbers(SHALLOW[1], mesh, plan)
        block = more - few
        return Price(block, few.plus(block, -SHALLOW[0]), _working(found), crossing, self.dtype)

    def _numbers(self, blocks: int, mesh: Mesh, plan: Plan) -> tuple[Numbers, RankMemory, float]:
        split = place(self.traced(blocks, ROWS * mesh.size(EXPERTS)), mesh, plan)
        assert isinstance(split, Program)
        finished = finish_program(split)
        assert isinstance(finished, Program)
        found = memory_of(finished, "sgd", timeline=False).largest
        moved = Counter[str]()
        for one in sent_by_activations(finished):
            moved[one.axis] += one.bytes
        experts = _of_experts(finished)
        numbers = Numbers(
            found.parameters - experts,
            experts,
            found.activations / ROWS,
            _seconds(split) / ROWS,
            {axis: size / ROWS for axis, size in moved.items()},
        )
        return numbers, found, _crossing(split) / ROWS


def within_stage(mesh: Mesh) -> Mesh:
    """The axes that split the layers of a stage, or what these compute on."""
    return Mesh(**{axis: mesh.size(axis) for axis in (EXPERTS, SEQUENCE, TENSOR) if mesh.size(axis) > 1})


def _seconds(split: Program) -> float:
    """Of operators and of collectives over ``tp``, forward and backward."""
    costs = Costs(split)
    calls = (node for node in split.graph.nodes if node.op == "call_function")
    own = (node for node in calls if node.target not in comm.TARGETS or TENSOR in comm.axes_over(node))
    return sum(map(costs.both, own))


def _of_experts(program: Program) -> int:
    """Bytes of the parameters that ``ep`` splits, of one rank."""
    kinds = (value(node) for node, _ in program.placeholders(InputKind.PARAMETER))
    return sum(bytes_of(kind, program.mesh) for kind in kinds if EXPERTS in kind.layout.axes)


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
    known = _rows(batch)
    return {
        name: value.new_zeros((rows, *value.shape[1:]))
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == known
        else value
        for name, value in batch.items()
    }


def _rows(batch: Batch) -> int:
    return max(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim())
