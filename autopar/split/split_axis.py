"""The split of a program over one axis: layouts are chosen for all values, shapes are cut, collectives are inserted.

The input is a graph without this axis. The output is the graph that each rank of the axis runs on its own part; the
axes that are split later see it as an ordinary graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.fast_graph import copied_node, created
from autopar.ir.layout import Layout, Partial, Placement, Split, Whole
from autopar.ir.node import Value, origin, set_origin, set_values, value, values
from autopar.ir.program import Program
from autopar.ir.tables import Decision
from autopar.rules.factoring import Strategy
from autopar.split.choose import Choice, Policy, choose
from autopar.split.conversions import Step, normalised, plan_placements, through_whole
from autopar.split.flow import Flow, Key, flow_of, key_of, refuse_other_draws

Check = Callable[[Flow, Choice], Mapping[str, Decision] | None]


def split_axis(program: Program, policy: Policy, check: Check | None = None) -> Program:
    """The program split over ``policy.axis``; unchanged if this axis has only one rank.

    ``check`` may raise on the chosen layouts before anything is rewritten, or give decisions of its own, by node name.
    """
    if program.mesh.size(policy.axis) == 1:
        return program
    refuse_other_draws(program, policy.rules)
    flow = spread_flow(program, policy)
    choice = choose(flow, policy)
    made = {**choice.decisions, **((check(flow, choice) if check else None) or {})}
    rewriter = _Rewriter(flow, choice)
    graph = rewriter.run()
    made = {rewriter.renamed.get(name, name): decision for name, decision in made.items()}
    return replace(program, graph=graph, decisions={**program.decisions, policy.axis: made})


def spread_flow(program: Program, policy: Policy) -> Flow:
    """The flow of all splits that the policy may use."""
    flow = flow_of(program, policy.axis, policy.rules)
    flow.spread(policy.seeds(flow))
    flow.spread_further(policy.further_seeds(flow))
    return flow


def rewritten(flow: Flow, choice: Choice) -> fx.Graph:
    """The graph that each rank of the axis runs with the chosen layouts."""
    return _Rewriter(flow, choice).run()


@dataclass
class _Held:
    """One value in the new graph: its node in each placement so far, and the step into each required placement."""

    whole_type: Value  # its type in the graph before this axis
    placements: dict[Placement, fx.Node]
    steps: dict[Placement, Step | None] = field(default_factory=dict)


class _Rewriter:
    def __init__(self, flow: Flow, choice: Choice) -> None:
        self.flow, self.choice = flow, choice
        self.program, self.mesh = flow.program, flow.program.mesh
        self.axis, self.ways = flow.axis, flow.ways
        self.graph = fx.Graph()
        self.held: dict[Key, _Held] = {}
        self.required: dict[Key, set[Placement]] = {}
        self.axis_indices: dict[str, fx.Node] = {}
        self.current: fx.Node | None = None
        self.types: dict[tuple[Value, Placement], Value] = {}
        self.renamed: dict[str, str] = {}  # name of a call -> of what a rule has written in its place

    def run(self) -> fx.Graph:
        self._note_required()
        for node in self.program.graph.nodes:
            self.current = node
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function" and node.target is not operator.getitem:
                self._call(node)
            elif node.op == "output":
                result = tuple(map(self._in_placement, self.program.returned, self.choice.returned))
                self.graph.output(result)
        self.graph.eliminate_dead_code()
        return self.graph

    def _note_required(self) -> None:
        for call, strategy in self.choice.strategies.items():
            for operand, placement in zip(self.flow.calls[call].operands, strategy.inputs):
                self._note(operand, placement)
        for node, placement in zip(self.program.returned, self.choice.returned):
            self._note(node, placement)

    def _note(self, operand: fx.Node, placement: Placement) -> None:
        flows = values(operand)[0].requires_grad
        self.required.setdefault(key_of(operand), set()).add(normalised(placement, flows))

    def placed(self, before: Value, placement: Placement) -> Value:
        if isinstance(placement, Whole):
            return before
        key = before, placement  # as equal blocks have them: the types of the new graph are shared
        if key not in self.types:
            self.types[key] = replace(before, layout=before.layout.place(self.axis, placement, self.mesh))
        return self.types[key]

    def _hold(self, key: Key, node: fx.Node, before: Value, produced: Placement) -> None:
        produced = normalised(produced, before.requires_grad)
        size = before.dtype.itemsize
        for length in before.layout.local_shape(self.mesh):
            size *= length
        placements = frozenset(self.required.get(key, ()))
        _, steps = plan_placements(produced, placements, size, before.requires_grad, self.ways)
        self.held[key] = _Held(before, {produced: node}, dict(steps))

    def _in_placement(self, operand: fx.Node, placement: Placement) -> fx.Node:
        """The value of ``operand`` (a node of the old graph) in ``placement``, by a collective if necessary."""
        key = key_of(operand)
        held = self.held[key]
        placement = normalised(placement, held.whole_type.requires_grad)
        if placement not in held.placements:
            step = held.steps[placement]
            assert step is not None, (operand, placement)
            source = self._in_placement(operand, step.source)
            held.placements[placement] = self._convert(source, step, held.whole_type)
        return held.placements[placement]

    def _convert(self, source: fx.Node, step: Step, before: Value) -> fx.Node:
        local = before.layout.local_shape(self.mesh)
        ends = [split for split in (step.source, step.target) if isinstance(split, Split)]
        if len(ends) == 2 and not all(split.divides(local[split.dim], self.ways) for split in ends):
            first, second = through_whole(step)
            return self._convert(self._convert(source, first, before), second, before)
        arguments: tuple[Any, ...] = (self.axis,)
        split = step.target if isinstance(step.target, Split) else step.source
        form = comm.COLLECTIVES[step.op].form
        if form is comm.REDUCTION:
            assert isinstance(step.source, Partial)
            arguments = (self.axis, step.source.op)
        elif form in (comm.ENDS, comm.ORDERS):
            arguments = (self.axis, self.ways, *([s.dim, s.signed_outer, *s.ratio] for s in ends))
        elif form is comm.PART:
            assert isinstance(split, Split)
            arguments = comm.where(split, self.axis, self.ways, local[split.dim])
        target = getattr(comm.OPS, step.op).default
        made = self.emit(target, (source, *arguments), self.placed(before, step.target))
        if isinstance(step.source, Partial) and origin(source).module:
            set_origin(made, origin(source))  # it finishes a sum of that module, whoever uses it first
        return made

    def emit(
        self, target: Any, args: tuple[Any, ...], *types: Value, kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        name: str = getattr(target, "_opname", None) or target.__name__
        node = created(self.graph, "call_function", target, args, dict(kwargs or {}), name)
        set_values(node, *types)
        if self.current is not None and self.current.op != "placeholder":
            set_origin(node, origin(self.current))
        return node

    def _placeholder(self, node: fx.Node) -> None:
        placement = self.choice.placeholders[node]
        copied = copied_node(self.graph, node, lambda source: source)
        set_values(copied, self.placed(value(node), placement))
        self._hold((node, 0), copied, value(node), placement)

    def _call(self, node: fx.Node) -> None:
        strategy = self.choice.strategies[node]
        call, factoring = self.flow.calls[node], self.flow.factorings[node]
        types = tuple(map(self.placed, values(node), strategy.outputs))
        args, kwargs = node.args, dict(node.kwargs)
        if factoring.localize and strategy.part:
            shapes = tuple(t.layout.local_shape(self.mesh) for t in types)
            args, kwargs = factoring.localize(call, strategy, shapes, self.ways)
        placements = iter([self._in_placement(operand, p) for operand, p in zip(call.operands, strategy.inputs)])
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: next(placements))
        new = created(self.graph, "call_function", node.target, args, kwargs, node.name)
        set_values(new, *types)
        set_origin(new, origin(node))
        rewrite = factoring.rewrites.get(strategy.part.factor) if strategy.part else None
        if rewrite:
            rewritten = self._rewritten(new, rewrite, values(node))
            self.graph.erase_node(new)
            new = rewritten
            set_values(new, *types)
            self.renamed[node.name] = new.name
        self._hold_outputs(node, new, strategy)

    def _rewritten(self, new: fx.Node, rewrite: Any, before: tuple[Value, ...]) -> fx.Node:
        found: fx.Node = rewrite(_Emitter(self, before), new, self.axis, self.ways)
        return found

    def _hold_outputs(self, node: fx.Node, new: fx.Node, strategy: Strategy) -> None:
        if len(values(node)) == 1 and not any(user.target is operator.getitem for user in node.users):
            self._hold((node, 0), new, value(node), strategy.outputs[0])
            return
        for user in node.users:
            assert user.target is operator.getitem, user
            index = user.args[1]
            assert isinstance(index, int)
            if (node, index) in self.held:
                continue
            before, placement = values(node)[index], strategy.outputs[index]
            item = self.emit(operator.getitem, (new, index), self.placed(before, placement))
            self._hold((node, index), item, before, placement)


class _Emitter:
    """Adds nodes for the rewrite of a rule (the ``Emit`` protocol of :mod:`autopar.rules.factoring`)."""

    def __init__(self, rewriter: _Rewriter, before: tuple[Value, ...]) -> None:
        self.rewriter, self.before = rewriter, before

    def __call__(
        self, target: Any, args: tuple[Any, ...], *types: Value, kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        return self.rewriter.emit(target, args, *types, kwargs=kwargs)

    def axis_index(self, axis: str) -> fx.Node:
        known = self.rewriter.axis_indices
        if axis not in known:
            index = Value(torch.int64, Layout(()))
            known[axis] = self.rewriter.emit(comm.OPS.axis_index.default, (axis,), index)
        return known[axis]

    def partial(self, whole: Value, axis: str, op: str = "sum") -> Value:
        if any(name == axis for name, _ in whole.layout.partial):
            return whole
        return replace(whole, layout=whole.layout.place(axis, Partial(op), self.rewriter.mesh))

    def all_reduce(self, summand: fx.Node, axis: str, op: str = "sum") -> fx.Node:
        layout = replace(value(summand).layout, partial=tuple(p for p in value(summand).layout.partial if p[0] != axis))
        return self(comm.OPS.all_reduce.default, (summand, axis, op), replace(value(summand), layout=layout))
