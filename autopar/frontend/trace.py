"""Tracing: an unmodified ``nn.Module`` and one call of it become a :class:`Program`, by ``torch.export``.

The graph is functional (no in-place operators), keeps ``linear``, ``scaled_dot_product_attention``, ``layer_norm`` and
``cross_entropy_loss`` whole, and has placeholders for parameters, buffers, lifted constants and user inputs.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, CustomObjArgument, InputSpec, OutputSpec, TensorArgument
from torch.export.graph_signature import InputKind as ExportInput
from torch.export.graph_signature import OutputKind as ExportOutput
from torch.utils import _pytree as pytree

from autopar.errors import AutoparError, NumericsError, TraceError
from autopar.frontend.asked_if_compiled import answered_as_in_a_run, is_asked
from autopar.frontend.capture import (
    MISSING,
    explained,
    faked,
    needs_fakes,
)
from autopar.frontend.equal_blocks import stamps
from autopar.frontend.exported import Build, Call, Found, traced
from autopar.frontend.looked_at import Replayed, looks_of
from autopar.frontend.numerics import check_numerics
from autopar.frontend.recast import recast, recast_call
from autopar.frontend.steady_state import bring_to_rest, check_at_rest, refuse_backward_hooks
from autopar.ir.collection import no_collection
from autopar.ir.fast_graph import copied_node
from autopar.ir.loss import inner_paths, joined_path, leaf_paths
from autopar.ir.node import clear_meta, output_node, set_origin, set_values, traced_origin, traced_value, value
from autopar.ir.operator_facts import types_of
from autopar.ir.program import Program
from autopar.ir.rewrite import operand
from autopar.ir.signature import user_tensors
from autopar.ir.tables import Input, InputKind, Output, OutputKind, Pins
from autopar.mesh import Mesh
from autopar.notes import warn
from autopar.observation.gradient_mode import GRADIENTS, without_gradients
from autopar.observation.observation import Observation
from autopar.plan import Plan
from autopar.selections.selected_rows import SelectedRows

aten = torch.ops.aten

INPUT_KINDS = {  # in the order in which a program takes them
    ExportInput.PARAMETER: InputKind.PARAMETER,
    ExportInput.BUFFER: InputKind.BUFFER,
    ExportInput.CONSTANT_TENSOR: InputKind.CONSTANT,
    ExportInput.USER_INPUT: InputKind.INPUT,
}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


# what is watched while a model is traced belongs to the process: classes of torch and of users, the environment
ALONE = threading.RLock()


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    plan: Plan | None = None,
) -> Program:
    """The program of ``model(*args, **kwargs)``, whole on every axis of ``mesh``.

    The model may be on the meta device or built under ``FakeTensorMode``: nothing is allocated then. Sizes, and
    arguments that are no tensors, are fixed to those of this call. The graph computes in ``plan.precision.param``, from
    parameters and inputs of that dtype. Compares numbers with the eager model once (``plan.check_numerics``; skipped
    without real weights).

    Raises TraceError when the model is no single graph, NumericsError when the graph computes something else.
    """
    mesh, plan = mesh or Mesh(), plan or Plan()
    dtype, given = plan.precision.param_dtype, (tuple(args), dict(kwargs or {}))
    with ALONE, recast(model, dtype) as dtypes:
        call: tuple[tuple[Any, ...], dict[str, Any]] = recast_call(given, dtype)
        checked = plan.check_numerics and not needs_fakes(model, pytree.tree_leaves(call))

        def build(exported: ExportedProgram) -> Program:
            return _program(exported, model, mesh, plan)

        with stamps() as stamped:
            (program, notes), seen, moved = _as_called(model, *call, build)
        try:
            if checked:
                _check(program, model, call, seen)
        except NumericsError:
            asks = is_asked(seen.record.code)
            if not stamped.made and not asks:
                raise
            # blocks look alike, and are not: one asks whether it is the last one
            with stamps(are_allowed=False), answered_as_in_a_run() if asks else nullcontext():
                (program, notes), seen, moved = _as_called(model, *call, build, moved)
            _check(program, model, call, seen)
        seen.report(moved)  # adds what was read to the guards of traces, and what this trace was to the records
    for note in dict.fromkeys(notes):
        warn(note, stacklevel=2)
    return replace(program, pins=Pins(dtypes=_passed_dtypes(program, dtypes, given)))


def _check(program: Program, model: nn.Module, call: Call, seen: Observation) -> None:
    with Observation(model, records=False).watching(), without_gradients() if _is_off(seen) else nullcontext():
        check_numerics(program, model, *call)


def _passed_dtypes(program: Program, parameters: Mapping[str, torch.dtype], call: Any) -> dict[str, torch.dtype]:
    """Node name -> dtype of the tensor that is passed, where the graph takes another."""
    tensors = iter(user_tensors(program, *call))
    dtypes = {}
    for node, entry in program.placeholders(InputKind.PARAMETER, InputKind.INPUT):
        own = parameters.get(entry.target) if entry.kind is InputKind.PARAMETER else next(tensors).dtype
        if own is not None and own != value(node).dtype:
            dtypes[node.name] = own
    return dtypes


def _as_called(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build, moved: Observation | None = None
) -> tuple[Found, Observation, Observation | None]:
    """As :func:`_at_rest`, without gradients where forward asks for them and the caller has none."""
    found, seen, moved = _at_rest(model, args, kwargs, build, moved)
    if not _is_off(seen):
        return found, seen, moved
    with without_gradients():
        return _at_rest(model, args, kwargs, build, moved)


def _is_off(seen: Observation) -> bool:
    return GRADIENTS in seen.record.modes and not torch.is_grad_enabled()


def _at_rest(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build, moved: Observation | None = None
) -> tuple[Found, Observation, Observation | None]:
    """The program of the model, once its forward leaves nothing for the next call to read, and notes.

    With them, what was seen, and the run that brought the model to rest (``moved``, if that was before).
    """
    refuse_backward_hooks(model)
    moving: Observation | None = None
    while True:
        observation = Observation(model, leaves=pytree.tree_leaves((args, kwargs)))
        fakes = needs_fakes(model, pytree.tree_leaves((args, kwargs)))
        try:
            faking = faked(model) if fakes else nullcontext()
            with explained(model), no_collection(), faking as mode, observation.watching():
                found = traced(model, args, kwargs, mode, observation, build)
            if moved is not None or observation.is_at_rest:
                check_at_rest(observation)
                return found, observation, moved
        except TraceError as refusal:
            if moved is not None:
                moved.undo()
                if type(refusal.__cause__) is AutoparError:  # what was made unavailable has been read
                    check_at_rest(moving or moved)
            if moved is not None or observation.is_at_rest:
                raise  # else it may come from what forward leaves
        moved, moving = _moved(model, args, kwargs, observation), observation


def _moved(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], moving: Observation) -> Observation:
    """The run of forward that brings it to rest; where its Python looks at values, it sees those of the example."""
    try:
        return bring_to_rest(model, args, kwargs, moving, nullcontext())
    except TraceError as refusal:
        with Observation(model).watching():
            looks = looks_of(model, args, kwargs, refusal, sizes=False)
        if not looks:
            raise
        return bring_to_rest(model, args, kwargs, moving, Replayed(looks, sizes=False))


def _program(exported: ExportedProgram, model: nn.Module, mesh: Mesh, plan: Plan) -> Program:
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    assert in_spec is not None and out_spec is not None
    entries, static_inputs = _inputs(exported, _input_paths(model, in_spec))
    inputs = _merge_tied(_dense(entries, model), model)
    returned, outputs, static_outputs = _outputs(exported, out_spec)
    graph = _copied(exported.graph, list(inputs.values()), returned)
    names = [node.name for node in graph.nodes if node.op == "placeholder"]  # 'input' has become 'input_1'
    return Program(
        graph=graph,
        mesh=mesh,
        plan=plan,
        inputs=tuple(replace(entry, node=name) for entry, name in zip(inputs, names)),
        outputs=outputs,
        constants={
            entry.target: exported.constants[entry.target] for entry in inputs if entry.kind is InputKind.CONSTANT
        },
        in_spec=in_spec,
        out_spec=out_spec,
        static_inputs=static_inputs,
        static_outputs=static_outputs,
        passes=("trace",),
    )


def _unsupported(spec: InputSpec) -> str:
    if isinstance(spec.arg, CustomObjArgument) and spec.arg.class_fqn == "torch._C.Generator":
        return (
            "forward draws random numbers from a torch.Generator of its own, and a program has one seed\n"
            "Way out: numbers that are always the same are drawn once, in __init__, and kept in a buffer "
            "(register_buffer); others are drawn without generator=, or outside, and passed as an argument."
        )
    return f"the model takes an input of kind {spec.kind.name} ({spec.arg}), which is not supported"


def _inputs(exported: ExportedProgram, paths: list[str]) -> tuple[dict[Input, fx.Node], tuple[tuple[int, Any], ...]]:
    """The table of tensor inputs in the program's order; flat positions and values of those that are no tensors."""
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    found: list[tuple[Input, fx.Node]] = []
    static: list[tuple[int, Any]] = []
    positions = itertools.count()
    for node, spec in zip(nodes, exported.graph_signature.input_specs):
        kind, target = INPUT_KINDS.get(spec.kind), spec.target
        if kind is None:
            raise TraceError(_unsupported(spec))
        if kind is InputKind.INPUT:
            position = next(positions)
            target = paths[position]
            if isinstance(spec.arg, ConstantArgument):
                static.append((position, spec.arg.value))
                continue
        assert target is not None
        found.append((Input(node.name, kind, target), node))
    order = list(INPUT_KINDS.values())
    return dict(sorted(found, key=lambda pair: order.index(pair[0].kind))), tuple(static)


def _dense(entries: dict[Input, fx.Node], model: nn.Module) -> dict[Input, fx.Node]:
    """``entries`` without the sparse buffers that forward does not read: a program has dense tensors."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    idle = [e for e, node in entries.items() if e.kind is InputKind.BUFFER and not node.users]
    sparse = {entry for entry in idle if buffers[entry.target].layout is not torch.strided}
    return {entry: node for entry, node in entries.items() if entry not in sparse}


def _merge_tied(entries: dict[Input, fx.Node], model: nn.Module) -> dict[Input, list[fx.Node]]:
    """One input, with aliases, in place of the placeholders of a parameter or buffer that has several names."""
    owners: dict[int, Input] = {}
    names: dict[Input, list[str]] = {}
    nodes: dict[Input, list[fx.Node]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for entry, node in entries.items():
        registered = entry.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        owner = owners.setdefault(id(tensors[entry.target]), entry) if registered else entry
        names.setdefault(owner, []).append(entry.target)
        nodes.setdefault(owner, []).append(node)
    return {replace(owner, aliases=tuple(names[owner][1:])): nodes[owner] for owner in nodes}


def _outputs(
    exported: ExportedProgram, out_spec: pytree.TreeSpec
) -> tuple[list[fx.Node], tuple[Output, ...], tuple[tuple[int, Any], ...]]:
    """The nodes that are returned, their table, and flat positions and values of outputs that are no tensors."""
    (nodes,) = output_node(exported.graph).args
    assert isinstance(nodes, (tuple, list))
    pairs: list[tuple[Any, OutputSpec]] = list(zip(nodes, exported.graph_signature.output_specs))
    paths = leaf_paths(out_spec)
    returned: list[fx.Node] = []
    table: list[Output] = []
    static: list[tuple[int, Any]] = []
    user = [(node, spec) for node, spec in pairs if spec.kind is ExportOutput.USER_OUTPUT]
    for position, (node, spec) in enumerate(user):
        if isinstance(node, fx.Node) and isinstance(spec.arg, TensorArgument):
            returned.append(node)
            table.append(Output(OutputKind.USER, paths[position]))
        else:
            fixed = getattr(spec.arg, "value", node)
            static.append((position, None if fixed == MISSING else fixed))
    for node, spec in pairs:
        if spec.kind is ExportOutput.BUFFER_MUTATION:
            returned.append(node)
            table.append(Output(OutputKind.BUFFER_UPDATE, str(spec.target)))
        elif spec.kind is not ExportOutput.USER_OUTPUT:
            raise TraceError(
                f"the model writes into its input or parameter '{spec.target or spec.arg.name}' in place\n"
                "Way out: let it write into a copy (x = x.clone()), or register the tensor as a buffer."
            )
    return returned, tuple(table), tuple(static)


def _copied(source: fx.Graph, placeholders: Sequence[Sequence[fx.Node]], returned: Sequence[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for group in placeholders:
        copies.update(dict.fromkeys(group, copied_node(graph, group[0], copies.__getitem__)))
        _describe(copies[group[0]], group[0])
    rows = SelectedRows(graph, copies)
    for node in source.nodes:
        if node.op == "call_function" and rows.takes(node):
            rows.copy(node)
        elif node.op == "call_function":
            copies[node] = _copy_operator(graph, node, copies)
            _describe(copies[node], node)
        elif node.op not in ("placeholder", "output") and node.users:
            raise TraceError(f"the model uses a control-flow operator, which is not supported: {node.format_node()}")
    graph.output(tuple(rows.returned(node) for node in returned))
    return graph


def _copy_operator(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """``node`` in ``graph``; an operator that autograd, or strides other than the fake ones, refuse is replaced."""
    shape = list(getattr(traced_value(node), "shape", ()))
    if node.target in VIEWS:
        return _call(graph, aten.reshape.default, copies[operand(node)], shape)
    if node.target is aten.copy.default:  # copy(x, y) is y in the type of x
        new = operand(node, 1)
        assert traced_value(new).dtype == traced_value(node).dtype, node.format_node()
        return _call(graph, aten.expand.default, copies[new], shape)
    if node.target is aten.native_dropout.default:
        return _call(graph, aten.dropout.default, copies[operand(node)], *node.args[1:])
    if node.target is operator.getitem and copies[operand(node)].target is aten.dropout.default:
        return copies[operand(node)]
    return copied_node(graph, node, copies.__getitem__)


def _call(graph: fx.Graph, target: torch._ops.OpOverload[..., Any], *args: Any) -> fx.Node:
    return graph.create_node("call_function", target, args, name=target._schema.name.partition("::")[2])


def _describe(copy: fx.Node, node: fx.Node) -> None:
    set_values(copy, *types_of(copy, traced_value(node)))
    set_origin(copy, traced_origin(node))
    clear_meta(copy)


def _input_paths(model: nn.Module, in_spec: pytree.TreeSpec) -> list[str]:
    """For each flat user input, the path by which a user would call it: ``labels``, ``images.0``."""
    positional, keyword = in_spec.children()
    names = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    paths = []
    for position, child in enumerate(positional.children()):
        name = names[position] if position < len(names) else str(position)
        paths += [joined_path(name, path) for path in inner_paths(child)]
    return paths + leaf_paths(keyword)
