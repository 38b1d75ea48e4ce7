"""The coverage of one model: exact on each mesh, and really split there.

A model that ended replicated is exact too, so exactness alone proves nothing. A mesh with data axes passes if every
product that depends on the batch is split by it, and the only floating collectives on those axes reduce the loss and
gradients. One with a tensor axis passes if nine tenths of the bytes of the parameters are split on it and stay so while
computing. One with a sequence axis passes if it splits every attention, and every product that depends on an input.
One with an axis of experts passes if every layer of experts is dealt out, and as a data axis but for the exchanges of
rows. ``remarks`` give the reasons why a mesh does not pass.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from autopar.analysis.experts import unrecognised
from autopar.analysis.footprint import held
from autopar.check import TOLERANCE, Reference, Report
from autopar.cost.flops import flops
from autopar.errors import AutoparError, IndivisibleError, NoExpertsError, NoSequenceError
from autopar.ir import collectives as comm
from autopar.ir.node import origin, value, values
from autopar.ir.operator_facts import is_operator, is_product
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.reach import descendants, made_only_of
from autopar.ir.rewrite import operand
from autopar.ir.tables import InputKind
from autopar.ir.traffic import Transfer
from autopar.mesh import DATA_AXES, EXPERTS, PIPELINE, SEQUENCE, Mesh
from autopar.operators.experts import EXPERT_LINEAR
from autopar.pipeline.microbatches import normalised
from autopar.plan import Plan
from autopar.rules import rule_for

TENSOR = "tp"
TO_EXPERTS = ("dispatch_rows", "return_rows")
STATISTICS = ("all_reduce", "all_gather", "all_gather_invariant")  # of a batch, where a layer normalises by them
ABSENT: Mapping[type[Exception], str] = {NoExpertsError: "experts", NoSequenceError: "sequence"}
MOST_OF_IT = 0.9  # of the bytes of the parameters
LARGE = 0.01  # a parameter with less than this share is not worth a remark
REMARKS = 4  # of one kind, before "and n more"


@dataclass(frozen=True)
class Case:
    """A mesh with a plan to try, and its name in the table."""

    title: str
    mesh: Mesh
    plan: Plan = field(default_factory=Plan)


CASES: tuple[Case, ...] = (
    Case("dp=2", Mesh(dp=2)),
    Case("tp=2", Mesh(tp=2)),
    Case("dp=2,tp=2", Mesh(dp=2, tp=2)),
    Case("tp=4", Mesh(tp=4)),
    Case("tp=2 megatron", Mesh(tp=2), Plan(sequence="megatron")),
    Case("sp=2", Mesh(sp=2), Plan(attention="ring")),
    Case("ep=2", Mesh(ep=2)),
)


@dataclass(frozen=True)
class Outcome:
    """One model on one mesh.

    Attributes:
        error: the largest error of loss, outputs and gradients in float64; None where there is no program.
        failure: why there is none; or, with an ``error``, why only a program with some parts whole could be made.
        absent: what the model does not have, though an axis is there to split it; then there is no program.
        parameters, compute: per axis the share of the parameters' bytes, and of the operations of the forward pass
            (for data axes and ``sp``: of those that depend on an input), that is split on it.
        efficiency: operations of the whole model over those that all ranks do together, forward and backward.
    """

    title: str
    error: float | None = None
    failure: str = ""
    absent: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)
    compute: Mapping[str, float] = field(default_factory=dict)
    efficiency: float = 0.0
    traffic: tuple[Transfer, ...] = ()
    remarks: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def exact(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE

    @property
    def passed(self) -> bool:
        return self.exact and not self.failure and not self.remarks


@dataclass(frozen=True)
class Coverage:
    """One model on all meshes. ``failure``: why it could not be traced; then there are no outcomes."""

    name: str
    family: str
    parameters: int = 0  # how many numbers
    failure: str = ""
    unknown: tuple[str, ...] = ()  # operators without a rule
    outcomes: tuple[Outcome, ...] = ()


def cover(name: str, family: str, model: nn.Module, batch: Mapping[str, Any], cases: Sequence[Case]) -> Coverage:
    """Trace ``model`` once, then split, simulate and measure it for every case.

    What does not divide is a ``failure`` also where ``Plan(on_indivisible="auto")`` keeps it whole, as it is little.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    try:
        reference = Reference(model, batch)
    except AutoparError as error:
        return Coverage(name, family, count, failure=_first_line(error))
    single = reference.program(Mesh())
    whole = operations(single)
    outcomes = tuple(_outcome(reference, case, whole) for case in cases)
    return Coverage(name, family, count, unknown=unknown_operators(single), outcomes=outcomes)


def unknown_operators(program: AnyProgram) -> tuple[str, ...]:
    """Operators of a program that have no splitting rule."""
    operators = (node.target for node in program.graph.nodes if is_operator(node))
    return tuple(sorted({str(target) for target in operators if rule_for(target) is None}))


def operations(program: AnyProgram) -> int:
    """Operations that one rank does in a step, forward and backward.

    On a pipeline, those of the rank that does most; each microbatch counts as the first.
    """
    if isinstance(program, PipelinedProgram):
        schedule = program.required_schedule
        ranks = [0] * len(schedule.ranks)
        for stage, place in zip(program.stages, schedule.placement):
            ranks[place] += schedule.microbatches * operations(stage)
        return max(ranks)
    role = program.required_role
    graphs = [graph for graph in (role.forward, role.backward) if graph is not None]
    nodes = [node for graph in graphs for node in graph.nodes]
    return sum(flops(node, lambda kind: kind.layout.local_shape(program.mesh)) for node in nodes)


def _outcome(reference: Reference, case: Case, whole: int) -> Outcome:
    start = time.perf_counter()
    failure, plan = "", case.plan
    try:
        strict = "error" if plan.on_indivisible == "auto" else plan.on_indivisible
        report = reference.check(case.mesh, replace(plan, on_indivisible=strict))
    except IndivisibleError as error:
        failure = _first_line(error)
        try:
            report = reference.check(case.mesh, replace(plan, on_indivisible="replicate"))
        except AutoparError:
            return Outcome(case.title, failure=failure, seconds=time.perf_counter() - start)
    except (AutoparError, RuntimeError) as error:
        absent = ABSENT.get(type(error), "")
        return Outcome(case.title, failure=_first_line(error), absent=absent, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return _measured(case, report, whole, normalised(reference.traced), failure, seconds)


def _measured(
    case: Case, report: Report, whole: int, normalised: frozenset[str], failure: str, seconds: float
) -> Outcome:
    program = report.program
    axes = [axis for axis, size in program.mesh.axes if size > 1]
    holdings = held(program)
    of_parameters = [axis for axis in axes if axis not in DATA_AXES or axis == EXPERTS]
    return Outcome(
        case.title,
        report.worst,
        failure,
        "",
        {axis: holdings.split[axis] / max(1, holdings.whole) for axis in of_parameters},
        {axis: compute_share(program, axis) for axis in axes},
        whole / max(1, program.mesh.world_size * operations(program)),
        report.step.traffic,
        tuple(remark for axis in axes for remark in remarks(program, axis, normalised)),
        seconds,
    )


# ---------------------------------------------------------------- what is split, and what is not


def compute_share(program: AnyProgram, axis: str) -> float:
    """The share of the forward pass's operations that ``axis`` splits; on data axes and ``sp``, of those that see an
    input.

    Pipeline stages split all of them.
    """
    if axis == PIPELINE:
        return 1.0
    seen = _after(program, InputKind.INPUT) if axis in (*DATA_AXES, SEQUENCE) else None
    done = {node: flops(node, lambda kind: kind.shape) for node in program.graph.nodes if seen is None or node in seen}
    total = sum(done.values())
    return sum(count for node, count in done.items() if _splits(node, axis)) / total if total else 1.0


def remarks(program: AnyProgram, axis: str, normalised: frozenset[str] = frozenset()) -> list[str]:
    """The reasons why ``axis`` does not pass. ``normalised``: modules that normalise by statistics of the batch."""
    if axis in DATA_AXES:
        found = [f"not split by {axis}: {node.name} at {_place(node)}" for node in _whole_products(program, axis)]
        experts = _few(_whole_experts(program, axis)) if axis == EXPERTS else []
        return experts + _few(found) + _few(_irregular(program, axis, normalised))
    if axis == SEQUENCE:
        return _few(f"not split by {axis}: {_place(node)}" for node in _whole_products(program, axis))
    if axis == TENSOR:
        share = held(program)
        gathered = [f"weight gathered over {axis}: {_place(node)}" for node in _gathered_weights(program, axis)]
        if share.split[axis] >= MOST_OF_IT * share.whole:
            return _few(gathered)
        return [f"whole on {axis}: {', '.join(_few(_whole_weights(program, axis)))}", *_few(gathered)]
    return []


def _after(program: AnyProgram, kind: InputKind) -> set[fx.Node]:
    """All nodes that depend on a placeholder of that kind."""
    found = {node for node, _ in program.placeholders(kind)}
    for node in program.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _splits(node: fx.Node, axis: str) -> bool:
    """Whether each rank of the axis does its own part of a call: an operand or an output is split on it."""
    return any(axis in kind.layout.axes for near in (node, *node.all_input_nodes) for kind in values(near))


def _whole_products(program: AnyProgram, axis: str) -> Iterator[fx.Node]:
    """Products that depend on an input and that every rank of the axis does whole."""
    seen = _after(program, InputKind.INPUT)
    for node in program.graph.nodes:
        if node in seen and is_product(node.target) and not _splits(node, axis):
            yield node


def _whole_experts(program: AnyProgram, axis: str) -> Iterator[str]:
    """Layers of which every rank of the axis has all experts."""
    for node in program.graph.nodes:
        if node.target is EXPERT_LINEAR and axis not in value(operand(node, 1)).layout.axes:
            yield f"all experts on each rank of {axis}: {_place(node)}"
    for layer in unrecognised(program):
        yield f"all experts on each rank of {axis}: {layer.module}, since {layer.reason}"


def _irregular(program: AnyProgram, axis: str, normalised: frozenset[str]) -> Iterator[str]:
    """Collectives on a data axis that neither reduce the loss or gradients (some product follows on them) nor send
    rows to experts.
    """
    roles = [part.required_role for part in program.parts]
    for graph in (graph for role in roles for graph in (role.forward, role.backward)):
        for node in graph.nodes if graph is not None else ():
            name = comm.moving(node.target)
            if name is None or name in TO_EXPERTS or axis not in comm.axes_over(node):
                continue
            if not value(node).dtype.is_floating_point:
                continue
            if name in STATISTICS and origin(node).module in normalised:
                yield f"statistics of batch normalisation reduced over {axis}"
            elif name != "all_reduce" or _feeds_a_product(node):
                yield f"{name} over {axis}: {_place(node)}"


def _feeds_a_product(node: fx.Node) -> bool:
    return any(is_product(user.target) for user in descendants([node]))


def _gathered_weights(program: AnyProgram, axis: str) -> Iterator[fx.Node]:
    weights = made_only_of(program.graph, (node for node, _ in program.placeholders(InputKind.PARAMETER)))
    for node in program.graph.nodes:
        if node in weights and node.target in comm.GATHERS and axis in comm.axes_over(node):
            yield node


def _whole_weights(program: AnyProgram, axis: str) -> Iterator[str]:
    total = held(program).whole
    for node, entry in program.placeholders(InputKind.PARAMETER):
        kind = value(node)
        share = math.prod(kind.shape) * kind.dtype.itemsize / total
        if axis not in kind.layout.axes and share >= LARGE:
            yield f"{entry.target} ({share:.0%})"


def _place(node: fx.Node) -> str:
    where = origin(node)
    return where.module or where.source.partition(" ")[0] or node.name


def _few(texts: Iterable[str]) -> list[str]:
    found = [text if count == 1 else f"{text} (x{count})" for text, count in Counter(texts).items()]
    more = len(found) - REMARKS
    return found if more <= 0 else [*found[:REMARKS], f"and {more} more"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
