"""What passes may do wrong: for each contract of the compiler's levels a few small passes that break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.layout import PARTIAL, Factor, Layout, Split
from autopar.ir.node import output_node, set_values, value, values
from autopar.ir.program import PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind, Role
from autopar.mesh import Mesh

aten = torch.ops.aten
Fault = Callable[[Any], Any]  # of a program, or of a pipelined one


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


def with_role(program: Program, change: Callable[[Role], Role]) -> Program:
    return replace(program, role=change(program.required_role))


def with_stage(program: PipelinedProgram, number: int, change: Callable[[Program], Program]) -> PipelinedProgram:
    stages = list(program.stages)
    stages[number] = change(stages[number])
    return replace(program, stages=tuple(stages))


# ---------------------------------------------------------------- faults of a program's own graph


def get_an_attribute(program: Program) -> Program:
    with program.graph.inserting_before(calls(program.graph)[0]):
        program.graph.get_attr("submodule")
    return program


def add_in_place(program: Program) -> Program:
    node = calls(program.graph)[0]
    with program.graph.inserting_after(node):
        set_values(program.graph.call_function(aten.add_.Tensor, (node, node)), value(node))
    return program


def swap_inputs(program: Program) -> Program:
    first, second, *rest = program.inputs
    return replace(program, inputs=(second, first, *rest))


def say_the_rows(program: Program) -> Program:
    """A view with the number of rows that there are on the mean."""
    node = calls(program.graph)[0]
    with program.graph.inserting_after(node):
        view = program.graph.call_function(aten.reshape.default, (node, [8]))
    set_values(view, replace(value(node), layout=Layout(((Factor(8, ragged=True),),))))
    return program


def lose_constants(program: Program) -> Program:
    return replace(program, constants={})


def shorten_constants(program: Program) -> Program:
    return replace(program, constants={name: tensor[:3] for name, tensor in program.constants.items()})


def lose_an_output(program: Program) -> Program:
    return replace(program, outputs=program.outputs[1:])


def lose_a_layout(program: Program) -> Program:
    set_values(calls(program.graph)[0])
    return program


def place(node: fx.Node, axis: str, program: Program) -> None:
    mesh = Mesh(**{**dict(program.mesh.axes), axis: 2})
    set_values(node, replace(value(node), layout=value(node).layout.place(axis, Split(0), mesh)))


def place_early(program: Program) -> Program:
    place(calls(program.graph)[0], "dp", program)
    return program


def reduce_early(program: Program) -> Program:
    node = calls(program.graph)[0]
    with program.graph.inserting_after(node):
        set_values(program.graph.call_function(comm.OPS.all_reduce.default, (node, "dp", "sum")), value(node))
    return program


def place_on_another_axis(program: Program) -> Program:
    place(calls(program.graph)[0], "sp", program)
    return program


def leave_a_sum(position: int) -> Fault:
    def leave_pending(program: Program) -> Program:
        node = program.returned[position]
        set_values(node, replace(value(node), layout=value(node).layout.place("tp", PARTIAL, program.mesh)))
        return program

    return leave_pending


def first_collective(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if comm.TARGETS.get(node.target) == name)


def reduce_for_nobody(program: Program) -> Program:
    node = first_collective(program, "all_reduce")
    with program.graph.inserting_after(node):
        set_values(program.graph.call_function(node.target, node.args), value(node))  # type: ignore[arg-type]
    return program


def reduce_over_another_axis(program: Program) -> Program:
    first_collective(program, "enter").update_arg(1, "sp")
    return program


def over(*axes: str, size: int) -> Fault:
    """On a mesh with ``sp`` too, the first enter is over ``axes`` as they are written here."""

    def enter_over(program: Program) -> Program:
        first_collective(program, "enter").update_arg(1, "+".join(axes))
        return replace(program, mesh=Mesh(**{**dict(program.mesh.axes), "sp": size}))

    return enter_over


def place_over_several(*groups: str) -> Fault:
    """On a mesh with ``sp=4`` too, the first value is split over each of ``groups``, as they are written here."""

    def place_all(program: Program) -> Program:
        node = calls(program.graph)[0]
        dims = ((Factor(64, groups),), *value(node).layout.dims[1:])
        set_values(node, replace(value(node), layout=Layout(dims)))
        return replace(program, mesh=Mesh(**{**dict(program.mesh.axes), "sp": 4}))

    return place_all


def enter_with_a_sum(program: Program) -> Program:
    node = first_collective(program, "enter")
    layout = Layout.whole(value(node).shape).place(str(node.args[1]), PARTIAL, program.mesh)
    set_values(node, replace(value(node), layout=layout))
    return program


def differentiate_early(program: Program) -> Program:
    return replace(program, role=Role(program.graph, None, program.graph))


# ---------------------------------------------------------------- faults of roles


def lose_the_role(program: Program) -> Program:
    return replace(program, role=None)


def save_one_more(program: Program) -> Program:
    return with_role(program, lambda role: replace(role, saved=role.saved + 1))


def take_another_dtype(program: Program) -> Program:
    node = next(iter(program.required_role.inference.nodes))
    set_values(node, replace(value(node), dtype=torch.float64))
    return program


def return_in_another_order(program: Program) -> Program:
    end = output_node(program.required_role.inference)
    end.args = (tuple(reversed(end.args[0])),)  # type: ignore[arg-type]
    return program


def save_in_another_dtype(program: Program) -> Program:
    backward = program.required_role.backward
    assert backward is not None
    node = next(iter(backward.nodes))
    set_values(node, replace(value(node), dtype=torch.float64))
    return program


def differentiate_nothing(program: Program) -> Program:
    return with_role(program, lambda role: replace(role, differentiable=(99,)))


def transpose_a_gradient(program: Program) -> Program:
    backward = program.required_role.backward
    assert backward is not None
    node = output_node(backward).args[0][program.required_role.grads.index("up.weight")]  # type: ignore[index]
    set_values(node, replace(value(node), layout=Layout.whole((8, 3))))  # type: ignore[arg-type]
    return program


def in_backward(change: Callable[[fx.Graph, fx.Node], None]) -> Fault:
    def change_backward(program: Program) -> Program:
        graph = program.required_role.backward
        assert graph is not None
        change(graph, calls(graph)[0])
        return program

    return change_backward


def insert(graph: fx.Graph, node: fx.Node, target: object, *args: object) -> fx.Node:
    with graph.inserting_after(node):
        made = graph.call_function(target, (node, *args))  # type: ignore[arg-type]
    set_values(made, *values(node)[:1])
    return made


def get_in_backward(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        graph.get_attr("submodule")


def start_without_waiting(graph: fx.Graph, node: fx.Node) -> None:
    started = insert(graph, node, comm.OPS.start_all_reduce.default, "tp", "sum")
    insert(graph, started, aten.neg.default)


def cut_without_saying(program: Program) -> Program:
    graph = program.required_role.forward
    node = next(n for n in calls(graph) if len(value(n).shape) == 2)
    size = value(node).layout.local_shape(program.mesh)[0]
    cut = insert(graph, node, comm.OPS.split.default, "tp", 2, 0, 1, [1], size)  # with the type of the whole
    insert(graph, cut, aten.neg.default)
    return program


# ---------------------------------------------------------------- faults of stages


def move_a_stage(program: PipelinedProgram) -> PipelinedProgram:
    return with_stage(program, 1, lambda stage: replace(stage, mesh=Mesh(dp=1, tp=2)))


def received(stage: Program) -> int:
    return next(place for place, entry in enumerate(stage.inputs) if entry.kind is InputKind.RECEIVED)


def receive_another(stage: Program) -> Program:
    inputs, place = list(stage.inputs), received(stage)
    inputs[place] = replace(inputs[place], target="0.another")
    return replace(stage, inputs=tuple(inputs))


def send_elsewhere(stage: Program) -> Program:
    outputs = [replace(out, target="1.another") if out.kind is OutputKind.SENT else out for out in stage.outputs]
    return replace(stage, outputs=tuple(outputs))


def rename_a_parameter(stage: Program) -> Program:
    first, *rest = stage.inputs
    assert first.kind is InputKind.PARAMETER
    return replace(stage, inputs=(replace(first, target="other.weight"), *rest))


def rename_the_loss(stage: Program) -> Program:
    return replace(stage, outputs=tuple(replace(out, target="another") for out in stage.outputs))


def keep_the_gradient(stage: Program) -> Program:
    def kept(role: Role) -> Role:
        return replace(role, grads=tuple("0.none" if target.startswith("0.") else target for target in role.grads))

    return with_role(stage, kept)


def in_stage(number: int, change: Callable[[Program], Program]) -> Fault:
    def change_stage(program: PipelinedProgram) -> PipelinedProgram:
        return with_stage(program, number, change)

    return change_stage


def forget_the_schedule(program: PipelinedProgram) -> PipelinedProgram:
    return replace(program, schedule=None)


def run_backwards(program: PipelinedProgram) -> PipelinedProgram:
    assert program.schedule is not None
    ranks = (tuple(reversed(program.schedule.ranks[0])), *program.schedule.ranks[1:])
    return replace(program, schedule=replace(program.schedule, ranks=ranks))


FAULTS: dict[str, list[tuple[Fault, str]]] = {  # contract -> passes that break it, and what is said then
    "is_flat": [(get_an_attribute, "a get_attr node (submodule)\nLikely fix: inline it")],
    "is_functional": [(add_in_place, "aten.add_.Tensor writes into its argument\nLikely fix: functionalise")],
    "placeholders_match_inputs": [(swap_inputs, "stands here in program.inputs\nLikely fix: keep both")],
    "constants_are_there": [
        (lose_constants, "there is no constant 'lifted"),
        (shorten_constants, "is torch.float32 (3,), the node says otherwise"),
    ],
    "results_match_outputs": [(lose_an_output, "2 values are returned, program.outputs has 1 entries")],
    "every_value_has_a_layout": [(lose_a_layout, "has no layout\nLikely fix: call set_values")],
    "nothing_is_placed": [
        (place_early, "is placed on the mesh already\nLikely fix: leave placing"),
        (reduce_early, "comm.all_reduce before anything is split"),
    ],
    "layouts_fit_the_mesh": [
        (place_on_another_axis, "speaks of axis 'sp', mesh(dp=2 tp=2) has none"),
        (place_over_several("dp+ep"), "speaks of axis 'ep', mesh(dp=2 sp=4 tp=2) has none"),
        (
            place_over_several("sp:inner3"),
            "groups of 3 do not divide sp=4\nLikely fix: take the name from program.mesh",
        ),
        (place_over_several("dp+sp", "sp:inner2"), "has axis 'sp' 2 times"),
        (place_over_several("sp:inner4"), "speaks of 'sp:inner4', which is 'sp' on mesh(dp=2 sp=4 tp=2)"),
    ],
    "loss_is_invariant": [(leave_a_sum(0), "the scalar output 'loss' is still a sum over axis 'tp'")],
    "no_partial_value_escapes": [(leave_a_sum(1), "output 'logits' is a pending sum over axis 'tp'")],
    "no_dead_collectives": [(reduce_for_nobody, "nothing uses the result of comm.all_reduce")],
    "collectives_fit_the_mesh": [
        (reduce_over_another_axis, "comm.enter is over axis 'sp', mesh(dp=2 tp=2) has none"),
        (over("sp", "dp", size=2), "comm.enter is over 'sp+dp', which is 'dp+sp' on mesh(dp=2 sp=2 tp=2)"),
        (over("dp", "sp", size=1), "is over 'dp+sp', which is 'dp' on mesh(dp=2 sp=1 tp=2)"),
    ],
    "ragged_sizes_are_free": [(say_the_rows, "it says the size 8 of ragged dim 0 of [8?]")],
    "collectives_match_layouts": [(enter_with_a_sum, "the result of comm.enter is [")],
    "is_not_differentiated": [(differentiate_early, "has forward and backward graphs already")],
    "is_differentiated": [(lose_the_role, "there is no role any more")],
    "roles_are_complete": [(save_one_more, "Likely fix: change saved, differentiable and grads with the graphs")],
    "roles_take_the_inputs": [(take_another_dtype, "the inference graph takes float64[8, 8], the program's input")],
    "roles_return_the_outputs": [(return_in_another_order, "the inference graph returns float32[4, 8], the program's")],
    "backward_takes_what_forward_saves": [
        (save_in_another_dtype, "backward takes float64["),
        (differentiate_nothing, "differentiable outputs [99] of 2"),
    ],
    "gradients_match_parameters": [(transpose_a_gradient, "the gradient of 'up.weight' is (8, 3), the parameter")],
    "collectives_resize_as_they_say": [(cut_without_saying, "comm.split of [")],
    "role_graphs_are_sound": [
        (in_backward(get_in_backward), "a get_attr node (submodule)"),
        (in_backward(lambda graph, node: set_values(node)), "has no layout\nLikely fix: call set_values"),
        (in_backward(lambda graph, node: insert(graph, node, aten.neg_.default) and None), "writes into its argument"),
        (
            in_backward(lambda graph, node: insert(graph, node, comm.OPS.all_reduce.default, "tp", "sum") and None),
            "nothing uses the result of comm.all_reduce",
        ),
        (in_backward(start_without_waiting), "neg_default uses comm.start_all_reduce, which nothing has waited for"),
    ],
    "stages_are_of_the_mesh": [(move_a_stage, "stage 1 is on mesh(dp=1 tp=2), the program on mesh(pp=2 tp=2)")],
    "what_is_sent_is_received": [
        (in_stage(1, receive_another), "stage 1 receives 'another' of stage 0, which does not send it there"),
        (in_stage(0, send_elsewhere), "of stage 0, which does not send it there"),
    ],
    "stages_hold_the_parameters": [(in_stage(0, rename_a_parameter), "stage 0 has 'other.weight' as float32[")],
    "stages_return_the_outputs": [(in_stage(1, rename_the_loss), "output 'loss' is returned by 0 stages")],
    "gradients_are_sent_back": [(in_stage(1, keep_the_gradient), "stage 1 sends no gradient of '")],
    "schedule_fits_the_stages": [
        (forget_the_schedule, "2 stages and no schedule"),
        (run_backwards, "schedule 1f1b"),
    ],
}
