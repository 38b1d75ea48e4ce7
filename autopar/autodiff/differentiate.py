"""Derive the backward pass: the forward graph of a program becomes the forward and backward graphs of a role.

The graph is run once on tensors without memory, at the local sizes of one rank, with torch's autograd on; everything
that torch does below autograd is recorded, forward and backward, as one joint graph (``recorder``), which is then cut
in two (``partition``). Every collective of the backward pass is a node, in the order in which all ranks run it.

before:
  x = input             : f32[6,8]
  w = param w           : f32[8,8]
  y = aten.linear(x, w) : f32[6,8]
  return y
after:
  forward:
    x = input             : f32[6,8]
    w = param w           : f32[8,8]
    y = aten.linear(x, w) : f32[6,8]
    return y, saved x
  backward:
    x      = saved          : f32[6,8]
    grad_y = grad at 0      : f32[6,8]
    t      = aten.t(grad_y) : f32[8,6]
    mm     = aten.mm(t, x)  : f32[8,8]
    return w=mm
  inference:
    x = input             : f32[6,8]
    w = param w           : f32[8,8]
    y = aten.linear(x, w) : f32[6,8]
    return y
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.autodiff.alike import Recorded, made_like
from autopar.autodiff.deepen import NotAlike, deepened
from autopar.autodiff.derivatives import DERIVATIVES
from autopar.autodiff.partition import Joint, Recompute, extract, partition
from autopar.autodiff.ragged import free_sizes
from autopar.autodiff.recorder import IDENTITIES, Recorder, fake_mode
from autopar.autodiff.repeats import Repeat, repeat_of, short
from autopar.errors import AutoparError, InvariantError
from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, set_origin, set_values, value, values
from autopar.ir.operator_facts import is_free
from autopar.ir.program import AnyProgram, Program
from autopar.ir.reach import ancestors
from autopar.ir.repeated_heads import unrepeated_heads
from autopar.ir.rewrite import remove_unused
from autopar.ir.tables import InputKind, OutputKind, Role
from autopar.operators import ATTENTIONS
from autopar.operators.registry import COMPOSITES

aten = torch.ops.aten

_LOGGER = logging.getLogger(__name__)


def differentiate(program: AnyProgram) -> AnyProgram:
    """``program`` with its role: forward, backward and inference graphs on local sizes; or with one in each stage.

    A program of which nothing requires a gradient gets a role without a backward graph.
    Raises InvariantError, naming the node, where the graph cannot run at the sizes of its layouts.
    """
    if isinstance(program, Program):
        return replace(program, role=role_of(program, recompute=always_recomputed(program)))
    known: list[Recorded] = []
    stages: list[Program] = []  # from the last: later stages determine which values of a stage get gradients
    reached: set[str] = set()
    for number in reversed(range(len(program.stages))):
        stage = program.stages[number]
        loss = program.loss_in(stage)
        wanted = tuple(
            position
            for position, entry in enumerate(stage.outputs)
            if position == loss or (entry.kind is OutputKind.SENT and f"{number}.{entry.target}" in reached)
        )
        role = role_of(stage, wanted, always_recomputed(stage), known)
        received = {entry.target for entry in stage.inputs if entry.kind is InputKind.RECEIVED}
        for target in received.intersection(role.grads):
            source, _, name = target.partition(".")
            reached.add(f"{source}.{number}.{name}")
        stages.insert(0, replace(stage, role=role))
    return replace(program, stages=tuple(stages))


def always_recomputed(program: Program) -> Recompute:
    """The predicate of nodes that backward always recomputes: free ones, and with ``Plan(zero=3)`` gathered ones."""
    if program.plan.zero < 3 or not program.plan.reshard_after_forward:
        return is_free
    parameters = {node.name for node, _ in program.placeholders(InputKind.PARAMETER)}
    return lambda node: is_free(node) or is_gathered(node, parameters)


def is_gathered(node: Node, parameters: Set[str]) -> bool:
    """Whether ``node`` gathers a parameter, or a cast of one."""
    if node.target not in comm.GATHERS:
        return False
    (source,) = node.all_input_nodes
    while source.op != "placeholder" and is_free(source):
        (source,) = source.all_input_nodes
    return source.op == "placeholder" and source.name in parameters


def role_of(
    program: Program,
    differentiable: tuple[int, ...] | None = None,
    recompute: Recompute = is_free,
    known: list[Recorded] | None = None,
) -> Role:
    """The graphs of one role; a pipeline stage is a program of its own here.

    ``differentiable``: positions of the outputs that get a gradient; by default the loss alone, or else all user
    outputs that need one. ``recompute``: the forward nodes that backward recomputes
    (:mod:`autopar.autodiff.partition`). ``known``: programs that are differentiated already, to which it is added.
    """
    inference = inference_graph(program)
    known = known if known is not None else []
    likes = (made_like(other, program, differentiable) for other in known)
    found = next((like for like in likes if like is not None), None)
    if found is None:
        found = Recorded(program, differentiable, *joint_graph(program, differentiable))
    known.append(found)
    if not found.gradients:
        return Role(inference, None, inference)
    forward, backward, saved = partition(found.joint, recompute)
    return Role(forward, backward, inference, len(saved), found.differentiable, found.gradients)


def inference_graph(program: Program) -> fx.Graph:
    """A copy of the forward graph without dead nodes and without nodes that only matter to a backward pass.

    Composites are written out, as in the graphs of training.
    """
    if any(node.target in COMPOSITES for node in program.graph.nodes):
        joint, _, _ = joint_graph(program, ())
        return extract(joint.graph, joint.inputs, joint.outputs)
    copy, copies = fx.Graph(), dict[Node, Node]()
    results = program.returned
    live = ancestors(results)
    for node in program.graph.nodes:
        if node.op == "placeholder" or node in live:
            if node.target in IDENTITIES or comm.does_nothing(node.target, node.args, program.mesh):
                copies[node] = copies[node.all_input_nodes[0]]
                continue
            copies[node] = copy.node_copy(node, copies.__getitem__)
            set_values(copies[node], *values(node))
            set_origin(copies[node], origin(node))
    copy.output(tuple(copies[node] for node in results))
    remove_unused(copy)  # nodes that only a straight_through used
    return copy


def joint_graph(
    program: Program, differentiable: tuple[int, ...] | None = None
) -> tuple[Joint, tuple[int, ...], tuple[str, ...]]:
    """Forward and backward as one graph, the positions of the differentiable outputs, the names of the gradients.

    Of equal blocks one after the other, four are recorded, and the others written out.
    """
    repeat = repeat_of(program)
    if repeat is not None:
        try:
            return _joint_of_few(program, repeat, differentiable)
        except NotAlike as reason:
            _LOGGER.debug("the blocks of %s are recorded one by one: %s", repeat.name, reason)
    recorder, joint, differentiable, gradients = _recorded(program, differentiable, {})
    return joint, differentiable, gradients


def _joint_of_few(
    program: Program, repeat: Repeat, differentiable: tuple[int, ...] | None
) -> tuple[Joint, tuple[int, ...], tuple[str, ...]]:
    few = short(program, repeat)
    recorder, joint, differentiable, gradients = _recorded(few.program, differentiable, few.block)
    deep, gradients = deepened(joint, recorder.blocks, gradients, few, program, repeat)
    return deep, differentiable, gradients


def _recorded(
    program: Program, differentiable: tuple[int, ...] | None, blocks: Mapping[Node, int]
) -> tuple[Recorder, Joint, tuple[int, ...], tuple[str, ...]]:
    graph = fx.Graph()
    names = (node.name for node in program.graph.nodes)
    with fake_mode(), Recorder(graph, program.mesh, names) as recorder:
        run = _Forward(program, recorder, blocks)
        outputs = run.outputs()
        if differentiable is None:
            differentiable = _differentiable(program, outputs)
        wanted = run.leaves() if differentiable else {}
        recorder.backward()
        tangents, gradients = _backward(recorder, [outputs[i] for i in differentiable], list(wanted.values()))
        reached = {name: grad for name, grad in zip(wanted, gradients) if grad is not None}
        graph.output(())
        free_sizes(graph, program.mesh)
        joint = Joint(
            graph,
            run.inputs,
            tangents,
            tuple(map(recorder.node_of, outputs)),
            tuple(map(recorder.node_of, reached.values())),
            recorder.forward_nodes,
        )
    return recorder, joint, differentiable, tuple(reached)


def _differentiable(program: Program, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """The loss alone where there is one; else all user outputs with a gradient."""
    if program.loss is not None and outputs[program.loss].requires_grad:
        return (program.loss,)
    return tuple(
        position
        for position, (entry, output) in enumerate(zip(program.outputs, outputs))
        if entry.kind is OutputKind.USER and output.requires_grad
    )


def _backward(
    recorder: Recorder, outputs: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[tuple[Node, ...], list[Tensor | None]]:
    """The tangent placeholders and the gradient of each leaf, None where there is no path to it."""
    if not outputs or not leaves:
        return (), [None] * len(leaves)
    tangents, nodes = [], []
    for output in outputs:
        with recorder.paused():
            tangent = torch.empty(output.shape, dtype=output.dtype)
        nodes.append(recorder.placeholder(f"grad_{recorder.node_of(output).name}", tangent))
        tangents.append(tangent)
    found = torch.autograd.grad(list(outputs), list(leaves), tangents, allow_unused=True)
    recorder.block = None
    # a gradient that is a strided or broadcast view would be a trap for optimizers and buckets
    return tuple(nodes), [None if grad is None else grad.contiguous() for grad in found]


class _Forward:
    """One run of a program's graph under a recorder, on tensors of the local sizes."""

    def __init__(self, program: Program, recorder: Recorder, blocks: Mapping[Node, int]) -> None:
        self.program, self.recorder, self.blocks = program, recorder, blocks
        self.tensors: dict[Node, Any] = {}
        self.named: dict[Any, None] = {}  # nodes of autograd's graph that have their origin already
        self.inputs = tuple(self._input(node) for node in program.graph.nodes if node.op == "placeholder")

    def _input(self, node: Node) -> Node:
        with self.recorder.paused():
            kind = value(node)
            shape = kind.layout.local_shape(self.program.mesh)
            tensor = torch.empty(shape, dtype=kind.dtype, requires_grad=kind.requires_grad)
        self.tensors[node] = tensor
        placed = self.recorder.placeholder(node.name, tensor)
        set_values(placed, kind)
        set_origin(placed, origin(node))
        return placed

    def leaves(self) -> dict[str, Tensor]:
        """The tensors whose gradients are required: parameters, then inputs and received values, by their names."""
        return {entry.target: self.tensors[node] for node, entry in self.program.leaves()}

    def outputs(self) -> list[Tensor]:
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.recorder.origin, self.recorder.expected = origin(node), (node.target, node.name)
                self.recorder.block = self.blocks.get(node)
                self.tensors[node] = self._result(node)
                self._name_gradients(node)
                self._keep_layout(node)
        return [self.tensors[node] for node in self.program.returned]

    def _result(self, node: Node) -> Any:
        if node.op != "call_function":
            raise InvariantError(f"{node.name} is a {node.op} node; a program has only functions and placeholders")
        given = node.args
        if node.target in ATTENTIONS:
            fewer = unrepeated_heads(given[1], given[2], lambda x: self.tensors[x].shape)  # type: ignore[arg-type]
            given = (given[0], *fewer, *given[3:])
        args, kwargs = fx.map_arg((given, node.kwargs), self.tensors.__getitem__)
        try:
            if node.target in DERIVATIVES:
                return DERIVATIVES[node.target](self.recorder, *args, **kwargs)  # type: ignore[index]
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except AutoparError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as problem:
            raise InvariantError(_failure(node, args, kwargs, problem)) from problem

    def _keep_layout(self, node: Node) -> None:
        """The recorded node of the same name holds the node's value, so it gets its layout."""
        types, tensor = values(node), self.tensors[node]
        if len(types) == 1 and isinstance(tensor, Tensor):
            recorded = self.recorder.node_of(tensor)
            if recorded.name == node.name and types[0].layout.local_shape(self.program.mesh) == tensor.shape:
                set_values(recorded, replace(types[0], requires_grad=False))

    def _name_gradients(self, node: Node) -> None:
        """Give the origin of ``node`` to the backward nodes that torch derives from it."""
        tensors = [item for item in pytree.tree_leaves(self.tensors[node]) if isinstance(item, Tensor)]
        wanted = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        # autograd holds the hooks, and tensors that the recorder holds hold autograd's nodes: no collector sees that
        where, block, recorder = origin(node), self.blocks.get(node), weakref.ref(self.recorder)

        def enter(_: Any) -> None:
            found = recorder()
            assert found is not None, "recording while torch derives"
            found.origin, found.block = where, block

        while wanted:
            step = wanted.pop()
            if step not in self.named:
                self.named[step] = None
                step.register_prehook(enter)
                wanted += [source for source, _ in step.next_functions if source is not None]


def _failure(node: Node, args: Any, kwargs: Any, problem: Exception) -> str:
    shapes = [list(item.shape) for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
    where = origin(node)
    place = f" ({where.module}{'; ' + where.source if where.source else ''})" if where.module or where.source else ""
    reason = str(problem).strip().splitlines() or [type(problem).__name__]
    return (
        f"{node.name} = {node.target}{place} cannot run on the local shapes {shapes}: {reason[0]}\n"
        f"a pass that cut its inputs left arguments of the old sizes behind, or its rule is wrong"
    )
