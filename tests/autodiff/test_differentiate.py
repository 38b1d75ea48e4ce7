"""The backward pass that is derived: its text, what is saved for it, and where its nodes come from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from autopar.autodiff.differentiate import differentiate, inference_graph, role_of
from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.node import Node, Origin, origin, output_node, set_origin, value
from autopar.ir.operator_facts import is_free
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.ir.tables import Role
from autopar.operators.attention import ATTENTION, ATTENTION_BACKWARD
from autopar.simulate import simulate

LINEAR = """
program mesh(dp=2 tp=2)
  w    = param w : f32[8@tp,4]
  x    = input : f32[6@dp,4]
  w_r  = comm.enter(w, dp) : f32[8@tp,4]
  y    = aten.linear(x, w_r) : f32[6@dp,8@tp]
  g    = aten.gelu(y) : f32[6@dp,8@tp]
  s    = aten.sum(g) : f32[]{sum:dp}{sum:tp}
  t    = comm.all_reduce(s, dp) : f32[]{sum:tp}
  loss = comm.all_reduce(t, tp) : f32[]
  return loss=loss
"""

BACKWARD = """
  x             = saved                          : f32[6@dp,4]
  y             = saved                          : f32[6@dp,8@tp]
  grad_loss     = grad loss                      : f32[]
  expand        = aten.expand(grad_loss, [3, 4]) : f32[3,4]
  gelu_backward = aten.gelu_backward(expand, y)  : f32[3,4]
  t_1           = aten.t(gelu_backward)          : f32[4,3]
  mm            = aten.mm(t_1, x)                : f32[4,4]
  all_reduce    = comm.all_reduce(mm, dp)        : f32[4,4]
  return w=all_reduce
"""


def program_of(text: str) -> Program:
    return parse(text.strip().replace("}{", ","))


def the_role(text: str) -> Role:
    return differentiate(program_of(text)).required_role


def backward_of(role: Role) -> fx.Graph:
    assert role.backward is not None
    return role.backward


def saved(role: Role) -> list[str]:
    results: tuple[Node, ...] = output_node(role.forward).args[0]  # type: ignore[assignment]
    return [node.name for node in results[len(results) - role.saved :]]


def targets(graph: fx.Graph) -> list[object]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_backward_as_text() -> None:
    role = the_role(LINEAR)
    assert role.grads == ("w",) and role.differentiable == (0,) and saved(role)[0] == "x"
    sections = str(differentiate(program_of(LINEAR))).split("\n\n")
    assert sections[2] == f"backward:{BACKWARD.rstrip()}"


def test_forward_keeps_linear_whole_and_drops_enter() -> None:
    role = the_role(LINEAR)
    aten, ops = torch.ops.aten, comm.OPS
    assert targets(role.forward) == [
        aten.linear.default,
        aten.gelu.default,
        aten.sum.default,
        ops.all_reduce.default,
        ops.all_reduce.default,
    ]
    assert targets(role.inference) == targets(role.forward)
    assert len(output_node(role.inference).args[0]) == 1  # type: ignore[arg-type]


def test_the_program_itself_is_left_alone() -> None:
    program = program_of(LINEAR)
    before = str(program)
    assert differentiate(program).graph is program.graph and str(program) == before


def test_what_costs_nothing_is_not_saved() -> None:
    role = the_role(
        """
program mesh(tp=1)
  w    = param w : f64[4,4]
  x    = input : f64[2,3,4]
  flat = aten.reshape(x, [6, 4]) : f64[6,4]
  half = aten.slice.Tensor(flat, 1, 0, 2) : f64[6,2]
  w_t  = aten.t(w) : f64[4,4]
  y    = aten.mm(flat, w_t) : f64[6,4]
  part = aten.slice.Tensor(y, 1, 2, 4) : f64[6,2]
  two  = aten.full([6, 2], 2.0, dtype=torch.float64) : f64[6,2] nograd
  z    = aten.mul.Tensor(part, half) : f64[6,2]
  q    = aten.mul.Tensor(z, two) : f64[6,2]
  loss = aten.sum(q) : f64[]
  return loss=loss
"""
    )
    assert saved(role) == ["x"]


def test_casts_of_parameters_are_made_again() -> None:
    role = the_role(
        """
program mesh(tp=1)
  w    = param w : f64[4,4]
  x    = input : f32[6,4]
  c    = aten._to_copy(w, dtype=torch.float32) : f32[4,4]
  y    = aten.linear(x, c) : f32[6,4]
  z    = aten.linear(y, c) : f32[6,4]
  loss = aten.sum(z) : f32[]
  return loss=loss
"""
    )
    assert len(saved(role)) == 3 and saved(role)[:2] == ["w", "x"]


def test_only_what_is_reached_and_wanted_has_a_gradient() -> None:
    text = """
program mesh(tp=1)
  a      = param a : f64[4]
  frozen = param frozen : f64[4] nograd
  unused = param unused : f64[4]
  x      = input : f64[4]
  y      = aten.mul.Tensor(a, frozen) : f64[4]
  z      = aten.mul.Tensor(y, x) : f64[4]
  loss   = aten.sum(z) : f64[]
  return loss=loss
"""
    assert the_role(text).grads == ("a",)


def test_without_gradients_there_is_no_backward() -> None:
    role = the_role(
        """
program mesh(tp=1)
  x = input : f64[4]
  y = aten.sin(x) : f64[4]
  return y
"""
    )
    assert role.backward is None and role.saved == 0 and role.forward is role.inference


TWO_OUTPUTS = """
program mesh(tp=1)
  a    = param a : f64[4]
  x    = input : f64[4]
  y    = aten.mul.Tensor(a, x) : f64[4]
  loss = aten.sum(y) : f64[]
  return y=y, loss=loss
"""


def test_the_loss_alone_is_differentiated_unless_told_otherwise() -> None:
    program = program_of(TWO_OUTPUTS)
    assert role_of(program).differentiable == (1,)
    both = role_of(program, differentiable=(0, 1))
    assert both.differentiable == (0, 1)
    inputs = [node.name for node in backward_of(both).nodes if node.op == "placeholder"]
    assert inputs[both.saved :] == ["grad_y", "grad_loss"] or len(inputs) == both.saved + 2


def test_of_several_scalars_the_one_called_loss_is_differentiated() -> None:
    """A model of experts returns the loss that balances them too; it is a part of the loss already."""
    named = TWO_OUTPUTS.replace("  return y=y,", "  aux  = aten.mean(y) : f64[]\n  return aux=aux,")
    program = program_of(named)
    assert role_of(program).differentiable == (program.loss,) == (1,)
    nameless = program_of(named.replace("loss=loss", "other=loss"))
    assert nameless.loss is None and role_of(nameless).differentiable == (0, 1)


def test_gathered_parameters_are_gathered_again_and_late() -> None:
    """ZeRO-3: what is gathered for forward is not kept, and gathered anew before it is used."""
    program = program_of(
        """
program mesh(dp=2)
  w    = param w : f64[4@dp,4]
  u    = param u : f64[4@dp,4]
  x    = input : f64[6@dp,4]
  w_f  = comm.all_gather(w, dp, dim=0) : f64[4,4]
  u_f  = comm.all_gather(u, dp, dim=0) : f64[4,4]
  y    = aten.linear(x, w_f) : f64[6@dp,4]
  z    = aten.linear(y, u_f) : f64[6@dp,4]
  h    = aten.tanh(z) : f64[6@dp,4]
  v    = aten.linear(h, w_f) : f64[6@dp,4]
  s    = aten.sum(v) : f64[]{sum:dp}
  loss = comm.all_reduce(s, dp) : f64[]
  return loss=loss
"""
    )
    gather, scatter = comm.OPS.all_gather.default, comm.OPS.reduce_scatter.default
    kept = role_of(program)
    assert targets(backward_of(kept)).count(gather) == 0
    role = role_of(program, recompute=lambda node: is_free(node) or node.target is gather)
    order = targets(backward_of(role))
    assert order.count(gather) == 2 and order.count(scatter) == 2
    tanh = order.index(torch.ops.aten.tanh_backward.default)
    assert order.index(gather) < tanh < len(order) - 1 - order[::-1].index(gather), "the second one waits"
    assert [t for t in targets(role.forward) if t in (gather, torch.ops.aten.linear.default)][:3] == [
        gather,
        torch.ops.aten.linear.default,
        gather,
    ]
    parameters = {name: torch.randn(4, 4, dtype=torch.float64) for name in "wu"}
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = simulate(differentiate(program), parameters, (x,))
    from dataclasses import replace

    found = simulate(replace(program, role=role), parameters, (x,))
    assert all(torch.equal(found.grads[name], expected.grads[name]) for name in parameters)


def test_gradients_are_reduced_as_soon_as_they_are_there() -> None:
    text = """
program mesh(dp=2)
  w    = param w : f64[4,4]
  b    = param b : f64[4]
  x    = input : f64[6@dp,4]
  w_r  = comm.enter(w, dp) : f64[4,4]
  b_r  = comm.enter(b, dp) : f64[4]
  y    = aten.linear(x, w_r) : f64[6@dp,4]
  h    = aten.tanh(y) : f64[6@dp,4]
  z    = aten.add.Tensor(h, b_r) : f64[6@dp,4]
  e    = aten.exp(z) : f64[6@dp,4]
  s    = aten.sum(e) : f64[]{sum:dp}
  loss = comm.all_reduce(s, dp) : f64[]
  return loss=loss
"""
    order = targets(backward_of(the_role(text)))
    reductions = [i for i, target in enumerate(order) if target is comm.OPS.all_reduce.default]
    assert len(reductions) == 2
    assert reductions[0] < order.index(torch.ops.aten.tanh_backward.default) < reductions[1]


ATTENTION_TEXT = """
program mesh(tp=1)
  w   = param w : f64[2,4,5,8]
  k   = param k : f64[2,2,5,8]
  v   = param v : f64[2,2,5,8]
  k_1 = aten.unsqueeze(k, 2) : f64[2,2,1,5,8]
  k_2 = aten.expand(k_1, [2, 2, 2, 5, 8]) : f64[2,2,2,5,8]
  k_3 = aten.reshape(k_2, [2, 4, 5, 8]) : f64[2,4,5,8]
  v_1 = aten.unsqueeze(v, 2) : f64[2,2,1,5,8]
  v_2 = aten.expand(v_1, [2, 2, 2, 5, 8]) : f64[2,2,2,5,8]
  v_3 = aten.clone(v_2) : f64[2,2,2,5,8]
  v_4 = aten.view(v_3, [2, 4, 5, 8]) : f64[2,4,5,8]
  o   = aten.scaled_dot_product_attention(w, k_3, v_4, is_causal=True) : f64[2,4,5,8]
  sq  = aten.pow.Tensor_Scalar(o, 2) : f64[2,4,5,8]
  loss = aten.sum(sq) : f64[]
  return loss=loss
"""


def test_attention_takes_grouped_heads_as_they_are() -> None:
    role = the_role(ATTENTION_TEXT)
    assert targets(role.forward)[0] is ATTENTION
    assert targets(backward_of(role)).count(ATTENTION_BACKWARD) == 1
    assert saved(role)[:3] == ["w", "k", "v"]
    shapes = [value(node).shape for node in role.forward.nodes if node.name in saved(role)]
    assert (2, 4, 5, 8) not in shapes[1:3]
    parameters = {
        "w": torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True),
        "k": torch.randn(2, 2, 5, 8, dtype=torch.float64, requires_grad=True),
        "v": torch.randn(2, 2, 5, 8, dtype=torch.float64, requires_grad=True),
    }
    step = simulate(differentiate(program_of(ATTENTION_TEXT)), parameters)
    k, v = (parameters[name].repeat_interleave(2, 1) for name in "kv")
    out = torch.nn.functional.scaled_dot_product_attention(parameters["w"], k, v, is_causal=True)
    expected = torch.autograd.grad((out**2).sum(), tuple(parameters.values()))
    for found, wanted in zip((step.grads[name] for name in parameters), expected, strict=True):
        assert float((found - wanted).abs().max()) < 1e-12


@pytest.mark.parametrize(("repeated", "shapes"), [("k_3", (4, 4)), ("v_4", (4, 4)), (None, (2, 2))])
def test_keys_and_values_keep_their_repeated_heads_together(repeated: str | None, shapes: tuple[int, int]) -> None:
    """Where only one of the two is what the other is, repeated heads: megatron's gather of whole keys, for one."""
    text = ATTENTION_TEXT
    if repeated is not None:
        head, tail = text.split("  o ")
        moved = f"  moved = aten.mul.Tensor({repeated}, 0.5) : f64[2,4,5,8]\n"
        text = head + moved + "  o " + tail.replace(f" {repeated},", " moved,")
    role = the_role(text)
    (attention,) = [node for node in role.forward.nodes if node.target is ATTENTION]
    assert tuple(value(node).shape[1] for node in attention.all_input_nodes[1:3]) == shapes
    parameters = {name: torch.randn(2, 4 if name == "w" else 2, 5, 8, dtype=torch.float64) for name in "wkv"}
    leaves = [tensor.requires_grad_() for tensor in parameters.values()]
    step = simulate(differentiate(program_of(text)), parameters)
    k, v = (
        parameters[name].repeat_interleave(2, 1) * (0.5 if repeated and repeated[0] == name else 1) for name in "kv"
    )
    out = torch.nn.functional.scaled_dot_product_attention(parameters["w"], k, v, is_causal=True)
    expected = torch.autograd.grad((out**2).sum(), leaves)
    for name, wanted in zip(parameters, expected):
        assert float((step.grads[name] - wanted).abs().max()) < 1e-12


def test_a_mask_with_a_gradient_takes_attention_apart() -> None:
    text = """
program mesh(tp=1)
  q    = param q : f64[2,4,5,8]
  bias = param bias : f64[1,4,5,5]
  o    = aten.scaled_dot_product_attention(q, q, q, bias) : f64[2,4,5,8]
  loss = aten.sum(o) : f64[]
  return loss=loss
"""
    role = the_role(text)
    assert ATTENTION not in targets(role.forward) and role.grads == ("q", "bias")


def test_the_functional_form_of_copy_has_a_derivative() -> None:
    text = """
program mesh(tp=1)
  w    = param w : f64[4]
  x    = input : f64[2,4]
  y    = aten.copy(x, w) : f64[2,4]
  loss = aten.sum(y) : f64[]
  return loss=loss
"""
    step = simulate(differentiate(program_of(text)), {"w": torch.randn(4, dtype=torch.float64)}, (torch.zeros(2, 4),))
    assert step.grads["w"].tolist() == [2.0] * 4


def test_what_is_written_into_a_strided_part_has_the_gradient_of_its_place() -> None:
    text = """program mesh(tp=1)
  w     = param w : f64[2]
  x     = param x : f64[1,4]
  k     = input k : f64[1,4]
  y     = aten.as_strided_scatter(x, w, [2], [2], 1) : f64[1,4]
  z     = aten.mul.Tensor(y, k) : f64[1,4]
  loss  = aten.sum(z) : f64[]
  return loss=loss"""
    given = {"w": torch.randn(2).double(), "x": torch.randn(1, 4).double()}
    step = simulate(differentiate(program_of(text)), given, (), {"k": torch.arange(1.0, 5.0)[None].double()})
    assert step.grads["x"].tolist() == [[1.0, 0.0, 3.0, 0.0]] and step.grads["w"].tolist() == [2.0, 4.0]


def test_backward_nodes_know_their_module() -> None:
    program = program_of(LINEAR)
    for node in program.graph.nodes:
        set_origin(node, Origin(f"m.{node.name}", "model.py:7"))
    role = role_of(program)
    where = {node.target: origin(node) for node in backward_of(role).nodes if node.op == "call_function"}
    assert where[torch.ops.aten.gelu_backward.default] == Origin("m.g", "model.py:7")
    assert where[torch.ops.aten.mm.default] == Origin("m.y", "model.py:7")
    assert where[comm.OPS.all_reduce.default] == Origin("m.w_r", "model.py:7")


def test_sizes_that_do_not_fit_name_the_node() -> None:
    program = program_of(LINEAR)
    (node,) = [node for node in program.graph.nodes if node.name == "y"]
    node.target, node.args = torch.ops.aten.mm.default, (node.args[0], node.args[0])
    set_origin(node, Origin("model.up", "model.py:7 in forward: self.up(x)"))
    with pytest.raises(InvariantError, match=r"y = aten.mm.default \(model.up; model.py:7 .*\[\[3, 4\], \[3, 4\]\]"):
        differentiate(program)


def test_collectives_of_one_rank_are_dropped() -> None:
    role = the_role(LINEAR.replace("tp=2", "tp=1").replace("dp=2", "dp=1"))
    for graph in (role.forward, backward_of(role), role.inference):
        assert not comm.TARGETS.keys() & set(targets(graph))


def test_inference_drops_dead_nodes() -> None:
    program = program_of(LINEAR)
    with program.graph.inserting_before(output_node(program.graph)):
        program.graph.call_function(torch.ops.aten.sin.default, (program.returned[0],))
    assert torch.ops.aten.sin.default not in targets(inference_graph(program))


def test_plain_functions_are_traced_through() -> None:
    def twice_and_shift(x: Tensor, by: float) -> tuple[Tensor, Tensor]:
        return x * 2, x + by

    program = program_of(TWO_OUTPUTS)
    (y,) = [node for node in program.graph.nodes if node.name == "y"]
    with program.graph.inserting_after(y):
        pair = program.graph.call_function(twice_and_shift, (y, 3.0))
    with program.graph.inserting_after(pair):
        import operator

        first = program.graph.call_function(operator.getitem, (pair, 0))
    (loss,) = [node for node in program.graph.nodes if node.name == "loss"]
    loss.args = (first,)
    role = role_of(program)
    assert targets(role.forward)[:2] == [torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Tensor]
