"""Contracts: each holds for right programs and, broken, names the node, its place and the fix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autopar.errors import InvariantError
from autopar.ir import invariants, role_invariants
from autopar.ir.invariants import Contract
from autopar.ir.loadable_operators import EVERY
from autopar.ir.node import Origin, output_node, set_origin
from autopar.ir.parse import parse
from autopar.ir.program import Program
from tests.conftest import Golden
from tests.texts import MLP, NORMALISED, ROLES, node_of

ALL: list[Contract] = [
    invariants.is_flat,
    invariants.is_functional,
    invariants.placeholders_match_inputs,
    invariants.results_match_outputs,
    invariants.every_value_has_a_layout,
    invariants.layouts_fit_the_mesh,
    invariants.no_partial_value_escapes,
    invariants.loss_is_invariant,
    invariants.no_dead_collectives,
    invariants.collectives_fit_the_mesh,
    invariants.collectives_match_layouts,
    role_invariants.roles_are_complete,
    role_invariants.gradients_match_parameters,
    invariants.whole_on("sp"),
]

WHOLE_NORMALISED = NORMALISED.replace("{sum:dp}", "")
RIGHT_ROLES = ROLES.replace("mm      = aten.mm(t, x)                : f32[2,2]", "mm = aten.mm(t, x) : f32[4@tp,2]")


@pytest.mark.parametrize("contract", ALL, ids=lambda contract: contract.__name__)
@pytest.mark.parametrize("source", [MLP, WHOLE_NORMALISED, RIGHT_ROLES], ids=["mlp", "normalised", "roles"])
def test_right_programs_hold(source: str, contract: Contract) -> None:
    contract(parse(source))


def breaks(contract: Contract, program: Program, *messages: str) -> str:
    with pytest.raises(InvariantError) as caught:
        contract(program)
    for message in (*messages, "\nLikely fix: "):
        assert message in str(caught.value)
    return str(caught.value)


def test_the_message_names_node_place_and_fix(golden: Golden) -> None:
    program = parse(MLP.replace("return all_reduce", "return loss=linear_1"))
    set_origin(node_of(program, "linear_1"), Origin("model.layers.0.mlp", "mlp.py:12 in forward: x = self.down(x)"))
    golden("invariant_error", breaks(invariants.no_partial_value_escapes, program))


def test_partial_outputs_and_buffer_updates() -> None:
    program = parse(NORMALISED.replace("new_mean=norm[3]", "").replace("=new_mean", "=total"))
    contract = invariants.no_partial_value_escapes
    message = breaks(contract, program, "total: output 'loss' is a pending sum over axis 'dp'")
    assert "insert comm.all_reduce(..., dp)" in message
    whole_loss = program.outputs[2:], (program.returned[2],)
    output_node(program.graph).args = (whole_loss[1],)
    breaks(contract, replace(program, outputs=whole_loss[0]), "update 'bn.running_mean' is")


def test_a_scalar_output_that_is_partial() -> None:
    breaks(
        invariants.loss_is_invariant, parse(NORMALISED), "total: the scalar output 'loss' is still a sum over axis 'dp'"
    )


def test_a_value_without_a_layout() -> None:
    program = parse(MLP.replace("aten.gelu(linear)                : f32[4@dp,16,32@tp]", "aten.gelu(linear)"))
    breaks(invariants.every_value_has_a_layout, program, "gelu: aten.gelu.default has no layout", "set_values")


def test_layouts_off_the_mesh() -> None:
    program = replace(parse(MLP), mesh=parse("program mesh(dp=2)\n return").mesh)
    breaks(invariants.layouts_fit_the_mesh, program, "p_up_weight: [32@tp,8] speaks of axis 'tp', mesh(dp=2) has none")


@pytest.mark.parametrize("kind", ["f32[4@dp@dp,16]", "f32[4@dp,16@dp]", "f32[4@dp,16]{sum:dp}"])
def test_an_axis_twice(kind: str) -> None:
    program = parse(f"program mesh(dp=2)\n  x = input : {kind}\n  return x")
    breaks(invariants.layouts_fit_the_mesh, program, "has axis 'dp' 2 times")


def test_a_pass_for_an_axis_runs_once() -> None:
    breaks(invariants.whole_on("tp"), parse(MLP), "p_up_weight: [32@tp,8] is already placed on axis 'tp'")
    assert invariants.whole_on("tp").__name__ == "whole_on(tp)"


def test_placeholders_and_inputs() -> None:
    program = parse(MLP)
    swapped = replace(program, inputs=(program.inputs[1], program.inputs[0], program.inputs[2]))
    breaks(invariants.placeholders_match_inputs, swapped, "p_up_weight: input p_down_weight stands here")
    fewer = replace(program, inputs=program.inputs[:2])
    breaks(invariants.placeholders_match_inputs, fewer, "placeholder x has no counterpart")
    more = replace(program, inputs=(*program.inputs, replace(program.inputs[0], node="more")))
    breaks(invariants.placeholders_match_inputs, more, "input more has no counterpart")
    up, down, x = program.inputs
    twice = replace(program, inputs=(up, replace(down, target="up.weight"), x))
    breaks(invariants.placeholders_match_inputs, twice, "param 'up.weight' is there twice")


def test_results_and_outputs() -> None:
    contract = invariants.results_match_outputs
    breaks(contract, replace(parse(MLP), outputs=()), "1 values are returned, program.outputs has 0")
    breaks(contract, parse(MLP.replace("return all_reduce", "return loss=None")), "value 0 is None")


def test_dead_collectives() -> None:
    program = parse(MLP.replace("return all_reduce", "return linear"))
    breaks(invariants.no_dead_collectives, program, "all_reduce: nothing uses the result of comm.all_reduce")


def test_collectives_over_wrong_axes_and_ways() -> None:
    contract = invariants.collectives_fit_the_mesh
    gather = "y = comm.all_gather(x, tp, ways=4, dim=0) : f32[8]"
    program = parse(f"program mesh(dp=2 tp=2)\n x = input : f32[8@tp]\n {gather}\n return y")
    breaks(contract, program, "over 4 ranks, axis 'tp' has 2", "program.mesh.size(axis)")
    program = replace(parse(MLP), mesh=parse("program mesh(dp=2)\n return").mesh)
    breaks(contract, program, "comm.all_reduce is over axis 'tp', mesh(dp=2) has none")


@pytest.mark.parametrize(
    ("operand", "line", "message"),
    [
        ("[8]", "comm.all_reduce(x, tp) : f32[8]", "y: the operand of comm.all_reduce is [8]; it should be partial"),
        ("[8]{sum:tp}", "comm.all_reduce(x, tp) : f32[8]{sum:tp}", "y: the result of comm.all_reduce is [8]{sum:tp}"),
        (
            "[8]",
            "comm.all_gather(x, tp, dim=0) : f32[8]",
            "y: the operand of comm.all_gather is [8]; it should be split",
        ),
        (
            "[8@tp]",
            "comm.split(x, tp, dim=0) : f32[8@tp]",
            "y: the operand of comm.split is [8@tp]; it should be whole",
        ),
        ("[8]{sum:tp}", "comm.enter(x, tp) : f32[8]{sum:tp}", "y: the operand of comm.enter is [8]{sum:tp}"),
        ("[8]{sum:tp}", "comm.reduce_scatter(x, tp, dim=0) : f32[8]", "y: the result of comm.reduce_scatter is [8]"),
    ],
)
def test_collectives_against_layouts(operand: str, line: str, message: str) -> None:
    program = parse(f"program mesh(tp=2)\n x = input : f32{operand}\n y = {line}\n return y")
    assert breaks(invariants.collectives_match_layouts, program).startswith(message)


def test_functional_and_flat_graphs() -> None:
    source = "program mesh()\n x = input : f32[8]\n y = aten.add_.Tensor(x, x) : f32[8]\n return y"
    breaks(invariants.is_functional, parse(source, operators=EVERY), "y: aten.add_.Tensor writes into its argument")
    program = parse(MLP)
    with program.graph.inserting_before(node_of(program, "linear")):
        program.graph.get_attr("submodule")
    breaks(invariants.is_flat, program, "submodule: a get_attr node")
    program = parse(MLP)
    with program.graph.inserting_before(node_of(program, "linear")):
        program.graph.call_function(torch.ops.higher_order.cond, ())
    breaks(invariants.is_flat, program, "holds a graph of its own")


def test_roles() -> None:
    program = parse(RIGHT_ROLES)
    role, contract = program.required_role, role_invariants.roles_are_complete
    wrong = replace(program, role=replace(role, saved=2))
    breaks(contract, wrong, "the forward graph takes 2 and returns 3 values; its role says 2 and 4")
    wrong = replace(program, role=replace(role, grads=()))
    breaks(contract, wrong, "the backward graph takes 2 and returns 1 values; its role says 2 and 0")


def test_gradients_and_parameters() -> None:
    contract = role_invariants.gradients_match_parameters
    other = parse(ROLES.replace("f32[2,2]", "f32[4,2]"))
    breaks(contract, other, "mm: the gradient of 'w' is (4, 2), the parameter (2, 2)")
    partial = parse(RIGHT_ROLES.replace("aten.mm(t, x) : f32[4@tp,2]", "aten.mm(t, x) : f32[4,2]{sum:tp}"))
    breaks(contract, partial, "the gradient of 'w' is a pending sum: [4,2]{sum:tp}")
