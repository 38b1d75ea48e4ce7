"""One reduction over all data-like axes: what is merged, what stays apart, and the bytes that it saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.check import TOLERANCE, check
from autopar.compiler import split_program
from autopar.ir import collectives as comm
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes.merge_reductions import merge_reductions
from autopar.plan import Plan
from tests.selection import one_each, slow_but
from tests.token_split import TokenWise, token_batch, tokens_split

MESHES = (
    "dp=2,sp=2", "dp=1,sp=2", "dp=2,sp=1", "dp=3,sp=2", "dp=2,sp=3", "dp=4,sp=2", "dp=2,sp=2,tp=2",
    "dp_replicate=2,dp_shard=2", "dp_replicate=2,dp_shard=1,sp=2", "dp_replicate=2,dp_shard=2,sp=2",
    "pp=2,dp=2,sp=2", "pp=2,dp=2,sp=2,tp=2",
)  # fmt: skip


@pytest.mark.parametrize("mesh", slow_but([1, 3, 9, 11], MESHES))
def test_equals_the_model_with_one_reduction_of_gradients(mesh: str) -> None:
    on = Mesh.parse(mesh)
    model = TokenWise()
    with tokens_split():
        report = check(model, token_batch(), on, Plan(microbatches=2 if on.is_pipelined else 1))
    assert report.worst <= TOLERANCE, report
    reduced = [t for t in report.step.traffic if t.phase == "backward" and t.axis not in ("tp", "pp")]
    data = on.merged(axis for axis in on.names if axis not in ("tp", "pp"))
    assert {(t.axis, t.name) for t in reduced} == {(data, "all_reduce")}
    if on.is_pipelined or on.size("tp") > 1:
        return
    ways, size = on.world_size, sum(parameter.numel() for parameter in model.parameters()) * 8
    assert sum(t.bytes for t in reduced) == 2 * (ways - 1) * size // ways
    (loss,) = [t for t in report.step.traffic if t.phase == "forward"]
    assert (loss.axis, loss.operations, loss.bytes) == (data, 2, 2 * (2 * (ways - 1) * 8 // ways))


def test_two_in_a_row_would_send_a_third_more() -> None:
    sent = {}
    for mesh in (Mesh(dp=2, sp=2), Mesh(dp=4), Mesh(dp=2), Mesh(sp=2)):
        with tokens_split():
            traffic = check(TokenWise(), token_batch(), mesh).step.traffic
        sent[mesh] = sum(t.bytes for t in traffic if t.phase == "backward")
    merged, flat, *rows = sent.values()
    assert merged == flat and 3 * sum(rows) == 4 * merged


@pytest.mark.parametrize("zero", slow_but([0, 3], [0, 1, 2, 3]))
def test_zero_keeps_the_reduction_over_replicas_of_its_parts_apart(zero: int) -> None:
    mesh = Mesh(dp_replicate=2, dp_shard=2, sp=2)
    with tokens_split():
        program = split_program(TokenWise(), mesh, Plan(zero=zero), (), token_batch(), after="merge_reductions")
    axes = {str(node.args[1]) for node in program.graph.nodes if node.target is comm.OPS.enter.default}
    assert axes == ({"dp_replicate", "dp_shard+sp"} if zero else {"dp_replicate+dp_shard+sp"})


class Uneven(nn.Module):
    """Of ``scale`` some uses see the tokens and some only the rows, of ``shift`` all see the rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.mix, self.tied = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.tied.weight = self.mix.weight

    def forward(self, ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
        x = nn.functional.one_hot(ids, 8).to(self.scale.dtype)
        each = self.tied((self.mix(x) * self.scale).tanh())
        return {"loss": each.square().sum() + (rows * self.scale + self.shift).tanh().square().sum()}


@pytest.mark.parametrize(
    "mesh, zero",
    one_each([Mesh(dp=2, sp=2), Mesh(dp_replicate=2, dp_shard=2, sp=2), Mesh(dp=2, sp=2, tp=2)], [0, 3]),
    ids=str,
)
def test_a_parameter_that_enters_one_axis_only_in_part(mesh: Mesh, zero: int) -> None:
    batch = {"ids": torch.arange(32).reshape(4, 8) % 8, "rows": torch.randn(4, 8)}
    plan = Plan(zero=zero, tensor={"*": "replicate"}, check_numerics=False)
    with tokens_split("ids"):
        report = check(Uneven(), batch, mesh, plan)
        program = split_program(Uneven(), mesh, plan, (), batch, after="merge_reductions")
    assert report.worst <= TOLERANCE, report
    entered: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        if node.target is comm.OPS.enter.default:
            source = node.args[0]
            while source.op != "placeholder":
                source = source.args[0]
            entered.setdefault(source.name, set()).add(str(node.args[1]))
    assert mesh.merged(["dp", "dp_shard", "sp"]) in entered["p_mix_weight"] or not zero
    assert not any("sp" in axis for axis in entered["p_shift"]) and "sp" in entered["p_scale"]


APART = {  # why: lines
    "tp is no data-like axis": ("b = comm.enter(w, dp) : f64[8]", "z = comm.enter(b, tp) : f64[8]"),
    "two uses": (
        "b = comm.enter(w, dp) : f64[8]",
        "c = comm.enter(b, sp) : f64[8]",
        "z = aten.add.Tensor(b, c) : f64[8]",
    ),
    "another reduction": (
        "b = comm.all_reduce(m, sp, op=max) : f64[8]{sum:dp}",
        "z = comm.all_reduce(b, dp) : f64[8]",
    ),
    "a sum over tp first": ("b = comm.all_reduce(t, tp) : f64[8]{sum:dp}", "z = comm.all_reduce(b, dp) : f64[8]"),
    "something large in between": (
        "b = comm.all_reduce(s, sp) : f64[8]{sum:dp}",
        "c = aten.neg(b) : f64[8]{sum:dp}",
        "z = comm.all_reduce(c, dp) : f64[8]",
    ),
    "a cast in between": (
        "b = comm.all_reduce(one, sp) : f64[]{sum:dp}",
        "c = aten._to_copy(b, dtype=bf16) : bf16[]{sum:dp}",
        "z = comm.all_reduce(c, dp) : bf16[]",
    ),
    "something that is not linear in between": (
        "b = comm.all_reduce(one, sp) : f64[]{sum:dp}",
        "c = aten.exp(b) : f64[]{sum:dp}",
        "z = comm.all_reduce(c, dp) : f64[]",
    ),
}
INPUTS = """program mesh(dp=2 sp=2 tp=2)
  w = param w : f64[8]
  m = input : f64[8]{sum:dp,max:sp}
  t = input : f64[8]{sum:dp,sum:tp}
  s = input : f64[8]{sum:dp,sum:sp}
  one = input : f64[]{sum:dp,sum:sp}
"""


@pytest.mark.parametrize("why", APART)
def test_what_stays_apart(why: str) -> None:
    program = parse(INPUTS + "".join(f"  {line}\n" for line in APART[why]) + "  return z, w, m, t, s, one")
    assert str(merge_reductions(program)) == str(program), why


def test_the_division_of_a_mean_moves_in_front_of_both_sums() -> None:
    lines = [
        "a = comm.all_reduce(one, sp) : f64[]{sum:dp}",
        "b = aten.div.Scalar(a, 2) : f64[]{sum:dp}",
        "c = aten.neg(b) : f64[]{sum:dp}",
        "z = comm.all_reduce(c, dp) : f64[]",
    ]
    program = merge_reductions(parse(INPUTS + "".join(f"  {line}\n" for line in lines) + "  return z, w, m, t, s"))
    found = [str(line).split(" = ")[1] for line in str(program).splitlines() if "aten" in line or "comm" in line]
    assert [" ".join(line.split()) for line in found] == [
        "aten.div.Scalar(one, 2) : f64[]{sum:dp,sum:sp}",
        "aten.neg(b) : f64[]{sum:dp,sum:sp}",
        "comm.all_reduce(c, dp+sp) : f64[]",
    ]


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).square().mean()


def test_the_loss_of_a_mean_is_reduced_once() -> None:
    with tokens_split():
        report = check(Mean(), {"x": torch.randn(6, 6, 8)}, Mesh(dp=2, sp=3))
    assert report.worst <= TOLERANCE and all(t.axis == "dp+sp" and t.operations == 1 for t in report.step.traffic)


def test_chains_of_any_length_and_order() -> None:
    program = parse(
        """program mesh(dp_replicate=2 dp_shard=2 sp=2)
  s = input : f64[8]{max:dp_replicate,max:dp_shard,max:sp}
  w = param w : f64[8]
  a = comm.all_reduce(s, sp, op=max) : f64[8]{max:dp_replicate,max:dp_shard}
  b = comm.all_reduce(a, dp_replicate, op=max) : f64[8]{max:dp_shard}
  c = comm.all_reduce(b, dp_shard, op=max) : f64[8]
  d = comm.enter(w, dp_replicate) : f64[8]
  e = comm.enter(d, dp_shard) : f64[8]
  f = comm.enter(e, sp) : f64[8]
  return c, f""",
        Plan(zero=2),
    )
    merged = merge_reductions(program)
    assert isinstance(merged, Program)
    found = [(comm.TARGETS[n.target], *n.args[1:]) for n in merged.graph.nodes if n.op == "call_function"]
    together, sharding = "dp_replicate+dp_shard+sp", ("enter", "dp_shard+sp")
    assert found == [("all_reduce", together, "max"), ("enter", "dp_replicate"), sharding]
