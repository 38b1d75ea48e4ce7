"""The emitted Python: what it looks like, what it frees, what it refuses."""

from __future__ import annotations

import operator
import traceback
import weakref

import pytest
import torch
from torch import fx

from autopar.autodiff.differentiate import differentiate
from autopar.codegen.python import compile_source, emit
from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.node import last_uses
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.plan import Plan

aten = torch.ops.aten

MLP = """
program mesh(dp=2 tp=2)
  up         = param up.weight                  : f64[8@tp,4]
  down       = param down.weight                : f64[4,8@tp]
  x          = input                            : f64[4@dp,4]
  up_1       = comm.enter(up, dp)               : f64[8@tp,4]
  down_1     = comm.enter(down, dp)             : f64[4,8@tp]
  linear     = aten.linear(x, up_1)             : f64[4@dp,8@tp]
  relu       = aten.relu(linear)                : f64[4@dp,8@tp]
  linear_1   = aten.linear(relu, down_1)        : f64[4@dp,4]{sum:tp}
  all_reduce = comm.all_reduce(linear_1, tp)    : f64[4@dp,4]
  sum_1      = aten.sum(all_reduce)             : f64[]{sum:dp}
  loss       = comm.all_reduce(sum_1, dp)       : f64[]
  return loss=loss
"""

INFERENCE = """\
# mesh(dp=2 tp=2) rank 3: dp=1 tp=1
import torch

aten_linear = torch.nn.functional.linear
aten_relu = torch.relu
aten_sum = torch.sum


def inference(comm, inputs):
    (
        up,    # param up.weight f64[8@tp,4]
        down,  # param down.weight f64[4,8@tp]
        x,     # input x f64[4@dp,4]
    ) = inputs
    inputs.clear()
    linear = aten_linear(x, up); del x, up  # f64[4@dp,8@tp]
    relu = aten_relu(linear); del linear  # f64[4@dp,8@tp]
    linear_1 = aten_linear(relu, down); del relu, down  # f64[4@dp,4]{sum:tp}
    all_reduce = comm.all_reduce(linear_1, "tp", "sum"); del linear_1  # f64[4@dp,4]
    sum_1 = aten_sum(all_reduce); del all_reduce  # f64[]{sum:dp}
    loss = comm.all_reduce(sum_1, "dp", "sum"); del sum_1  # f64[]
    return (loss,)
"""


class Alone:
    """``comm`` of a mesh of one rank."""

    device = torch.device("cpu")

    def all_reduce(self, x: torch.Tensor, axis: str, op: str) -> torch.Tensor:
        return x

    def axis_index(self, axis: str) -> torch.Tensor:
        return torch.tensor(0)


def program_of(graph: fx.Graph, mesh: Mesh | None = None) -> Program:
    return Program(graph, mesh or Mesh(dp=2, tp=2), Plan(), (), ())


def run(graph: fx.Graph, *inputs: object) -> tuple[object, ...]:
    return compile_source(emit({"f": graph}, program_of(graph)), "f")(Alone(), list(inputs))


@pytest.fixture(scope="module")
def mlp() -> Program:
    return differentiate(parse(MLP))


def test_reads_like_a_program(mlp: Program) -> None:
    assert mlp.rank(3).inference_code == INFERENCE


def test_rank_has_forward_and_backward(mlp: Program) -> None:
    code = mlp.rank(3).code
    assert "def forward(comm, inputs):" in code and "def backward(comm, inputs):" in code
    assert code.count('comm.all_reduce(linear_1, "tp", "sum")') == 1
    assert code.count('"dp", "sum")') == 3, "the loss and two gradients"
    compile(code, "rank", "exec")


def test_before_differentiate_the_graph_itself_is_shown() -> None:
    code = parse(MLP).rank(0).code
    assert 'comm.enter(up, "dp")' in code and "backward" not in code
    assert parse(MLP).rank(0).inference_code.count("def inference") == 1


def test_ranks_outside_the_mesh_are_refused(mlp: Program) -> None:
    with pytest.raises(ValueError, match="ranks 0 to 3"):
        mlp.rank(4)


def test_backward_computes_gradients(mlp: Program) -> None:
    role = mlp.required_role
    assert role.backward is not None
    torch.manual_seed(0)
    up, down, x = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 4), (4, 4), (2, 4)))
    up.requires_grad_()
    down.requires_grad_()
    loss = (torch.relu(x @ up.t()) @ down.t()).sum()
    expected = torch.autograd.grad(loss, [up, down])
    with torch.no_grad():
        forward = compile_source(emit({"forward": role.forward}, mlp), "forward")
        backward = compile_source(emit({"backward": role.backward}, mlp), "backward")
        found, *saved = forward(Alone(), [up, down, x])
        grads = backward(Alone(), [*saved, torch.ones((), dtype=torch.float64)])
    assert torch.equal(found, loss.detach())
    for name, grad, wanted in zip(role.grads, grads, expected):
        assert torch.allclose(grad, wanted, rtol=0, atol=1e-14), name


def test_inputs_die_at_their_last_use() -> None:
    seen: list[bool] = []
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    first = graph.call_function(aten.neg.default, (a,))
    probe = graph.call_function(comm.OPS.all_reduce.default, (first, "dp", "sum"))
    graph.output((graph.call_function(aten.add.Tensor, (probe, b)),))
    function = compile_source(emit({"f": graph}, program_of(graph)), "f")
    inputs = [torch.ones(2), torch.ones(2)]
    alive = weakref.ref(inputs[0])

    class Probe(Alone):
        def all_reduce(self, x: torch.Tensor, axis: str, op: str) -> torch.Tensor:
            seen.append(alive() is None)
            return x

    assert torch.equal(function(Probe(), inputs)[0], torch.zeros(2))
    assert seen == [True] and inputs == []


def test_unused_values_are_deleted() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    unused = graph.call_function(aten.neg.default, (a,))
    graph.output((a,))
    assert last_uses(graph) == {unused: [unused], b: [b]}
    source = emit({"f": graph}, program_of(graph))
    assert "del b\n" in source and f"{unused.name} = aten_neg(a); del {unused.name}" in source
    assert b.name == "b"


def test_arguments_survive() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    where = {"dtype": torch.float64, "device": torch.device("cuda:1")}
    filled = graph.call_function(aten.full.default, ([2, 2], float("-inf")), where)
    parts = graph.call_function(aten.split.Tensor, (x, 1))
    second = graph.call_function(operator.getitem, (parts, 1))
    graph.output((filled, second))
    found = run(graph, torch.tensor([[1.0], [2.0]]))
    assert found[0].dtype == torch.float64 and bool((found[0] == -torch.inf).all()), "made on the rank's own device"
    assert torch.equal(found[1], torch.tensor([[2.0]]))


def test_names_of_the_function_are_not_shadowed() -> None:
    graph = fx.Graph()
    node = graph.placeholder("comm")
    other = graph.placeholder("aten_add_Tensor")
    graph.output((graph.call_function(aten.add.Tensor, (node, other)),))
    assert run(graph, torch.tensor(1.0), torch.tensor(2.0)) == (torch.tensor(3.0),)


def test_rank_constants_are_folded() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(comm.OPS.axis_index.default, ("tp",)),))
    program = program_of(graph)
    assert 'comm.axis_index("tp")' in emit({"f": graph}, program)
    assert "torch.tensor(1, device=comm.device)" in emit({"f": graph}, program, program.mesh.coordinates(3))


def test_collectives_leave_out_what_says_nothing() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    plain = graph.call_function(comm.OPS.all_gather.default, (x, "tp", 2, 0, 1, [1], 8))
    fused = graph.call_function(comm.OPS.all_gather.default, (x, "tp", 2, 0, 3, [2, 1], 18))
    graph.output((plain, fused))
    source = emit({"f": graph}, program_of(graph))
    assert 'comm.all_gather(x, "tp", ways=2, dim=0, length=8)' in source
    assert 'comm.all_gather(x, "tp", ways=2, dim=0, outer=3, ratio=[2, 1], length=18)' in source


def test_a_function_without_a_name_is_refused() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(lambda x: x, (graph.placeholder("x"),)),))
    with pytest.raises(InvariantError, match="autopar.operators.operator"):
        emit({"f": graph}, program_of(graph))


def test_tracebacks_show_the_line() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.mm.default, (x, x)),))
    try:
        run(graph, torch.ones(2, 3))
    except RuntimeError:
        assert "= aten_mm(x, x); del x" in traceback.format_exc()
    else:
        pytest.fail("mm of a matrix that is not square")
