"""Derive the backward pass: the forward graph of a program becomes the forward and backward graphs of a role.

Each call is run once on tensors without memory, at the local sizes of one rank, with torch's autograd on
(``call_records``); everything that torch does below autograd is recorded, forward and backward, as one joint graph
(``replay``, ``recorder``), which is then cut in two (``partition``). Every collective of the backward pass is a node,
in the order in which all ranks run it.

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
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor, fx

from autopar.autodiff.alike import Recorded, made_like
from autopar.autodiff.call_records import Calls, Unheard
from autopar.autodiff.deepen import NotAlike, deepened
from autopar.autodiff.forward_run import ForwardRun
from autopar.autodiff.partition import Joint, Recompute, extract, partition
from autopar.autodiff.ragged import free_sizes
from autopar.autodiff.recorder import IDENTITIES, Recorder, fake_mode
from autopar.autodiff.repeats import Repeat, repeat_of, short
from autopar.autodiff.replay import ReplayRun
from autopar.ir import collectives as comm
from autopar.ir.fast_graph import copied_node
from autopar.ir.node import Node
from autopar.ir.operator_facts import is_free
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.reach import ancestors
from autopar.ir.rewrite import remove_unused
from autopar.ir.tables import InputKind, OutputKind, Role
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
    with Calls(program.mesh) as calls:
        return replace(program, stages=_stages(program, calls))


def _stages(program: PipelinedProgram, calls: Calls) -> tuple[Program, ...]:
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
        role = role_of(stage, wanted, always_recomputed(stage), known, calls)
        received = {entry.target for entry in stage.inputs if entry.kind is InputKind.RECEIVED}
        for target in received.intersection(role.grads):
            source, _, name = target.partition(".")
            reached.add(f"{source}.{number}.{name}")
        stages.insert(0, replace(stage, role=role))
    return tuple(stages)


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
    calls: Calls | None = None,
) -> Role:
    """The graphs of one role; a pipeline stage is a program of its own here.

    ``differentiable``: positions of the outputs that get a gradient; by default the loss alone, or else all user
    outputs that need one. ``recompute``: the forward nodes that backward recomputes
    (:mod:`autopar.autodiff.partition`). ``known``: programs that are differentiated already, to which it is added;
    ``calls``: those of programs on the same mesh.
    """
    if calls is None:
        with Calls(program.mesh) as calls:
            return role_of(program, differentiable, recompute, known, calls)
    inference = inference_graph(program, calls)
    known = known if known is not None else []
    likes = (made_like(other, program, differentiable) for other in known)
    found = next((like for like in likes if like is not None), None)
    if found is None:
        found = Recorded(program, differentiable, *joint_graph(program, differentiable, calls))
    known.append(found)
    if not found.gradients:
        return Role(inference, None, inference)
    forward, backward, saved = partition(found.joint, recompute)
    return Role(forward, backward, inference, len(saved), found.differentiable, found.gradients)


def inference_graph(program: Program, calls: Calls | None = None) -> fx.Graph:
    """A copy of the forward graph without dead nodes and without nodes that only matter to a backward pass.

    Composites are written out, as in the graphs of training.
    """
    if any(node.target in COMPOSITES for node in program.graph.nodes):
        if calls is None:
            with Calls(program.mesh) as calls:
                return inference_graph(program, calls)
        joint, _, _ = joint_graph(program, (), calls)
        return extract(joint.graph, joint.inputs, joint.outputs)
    copy, copies = fx.Graph(), dict[Node, Node]()
    results = program.returned
    live = ancestors(results)
    for node in program.graph.nodes:
        if node.op == "placeholder" or node in live:
            if node.target in IDENTITIES or comm.does_nothing(node.target, node.args, program.mesh):
                copies[node] = copies[node.all_input_nodes[0]]
                continue
            copies[node] = copied_node(copy, node, copies.__getitem__)
    copy.output(tuple(copies[node] for node in results))
    remove_unused(copy)  # nodes that only a straight_through used
    return copy


def joint_graph(
    program: Program, differentiable: tuple[int, ...] | None, calls: Calls
) -> tuple[Joint, tuple[int, ...], tuple[str, ...]]:
    """Forward and backward as one graph, the positions of the differentiable outputs, the names of the gradients.

    Of equal blocks one after the other, four are replayed, and the others written out.
    """
    repeat = repeat_of(program)
    if repeat is not None:
        try:
            return _joint_of_few(program, repeat, differentiable, calls)
        except NotAlike as reason:
            _LOGGER.debug("the blocks of %s are recorded one by one: %s", repeat.name, reason)
    recorder, joint, differentiable, gradients = _recorded(program, differentiable, {}, calls)
    return joint, differentiable, gradients


def _joint_of_few(
    program: Program, repeat: Repeat, differentiable: tuple[int, ...] | None, calls: Calls
) -> tuple[Joint, tuple[int, ...], tuple[str, ...]]:
    few = short(program, repeat)
    recorder, joint, differentiable, gradients = _recorded(few.program, differentiable, few.block, calls)
    deep, gradients = deepened(joint, recorder.blocks, gradients, few, program, repeat)
    return deep, differentiable, gradients


def _recorded(
    program: Program, differentiable: tuple[int, ...] | None, blocks: Mapping[Node, int], calls: Calls
) -> tuple[Recorder, Joint, tuple[int, ...], tuple[str, ...]]:
    """As torch makes it, call by call; or of all calls at once, where one of them is more than its record can say."""
    try:
        recorder = _recorder(program)
        return _run(ReplayRun(program, recorder, blocks, calls), differentiable)
    except Unheard as reason:
        _LOGGER.debug("all calls are recorded at once: %s", reason)
    with fake_mode(), _recorder(program) as recorder:
        return _run(ForwardRun(program, recorder, blocks), differentiable)


def _recorder(program: Program) -> Recorder:
    return Recorder(fx.Graph(), program.mesh, (node.name for node in program.graph.nodes))


def _run(
    run: ForwardRun, differentiable: tuple[int, ...] | None
) -> tuple[Recorder, Joint, tuple[int, ...], tuple[str, ...]]:
    program, recorder = run.program, run.recorder
    outputs = run.outputs()
    if differentiable is None:
        differentiable = _differentiable(program, outputs)
    wanted = run.leaves() if differentiable else {}
    recorder.backward()
    tangents, gradients = run.backward([outputs[i] for i in differentiable], list(wanted.values()))
    reached = {name: grad for name, grad in zip(wanted, gradients) if grad is not None}
    recorder.graph.output(())
    free_sizes(recorder.graph, program.mesh)
    joint = Joint(
        recorder.graph,
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
