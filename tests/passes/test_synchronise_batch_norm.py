"""Batch norm as sums: the numbers and gradients of torch's own kernel, in training mode and on split batches only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.check import TOLERANCE, check
from autopar.compiler import compile_program
from autopar.frontend.numerics import run_graph
from autopar.ir.collectives import REDUCTIONS, started_too
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes.synchronise_batch_norm import synchronise_batch_norm
from autopar.plan import Plan
from tests.passes.canonical import counts

NORM = "aten._native_batch_norm_legit_functional"


def program(mesh: str = "dp=2", dtype: str = "f64", training: bool = True, affine: bool = True) -> Program:
    w, b = ("w", "b") if affine else ("None", "None")
    return parse(f"""program mesh({mesh})
  x    = input     : {dtype}[8,3,5]
  w    = param w   : f64[3]
  b    = param b   : f64[3]
  m    = buffer m  : f64[3]
  v    = buffer v  : f64[3]
  norm = {NORM}(x, {w}, {b}, m, v, {training}, 0.3, 0.01) : ({dtype}[8,3,5], f64[3], f64[3], f64[3], f64[3])
  y    = norm[0]   : {dtype}[8,3,5]
  mean = norm[1]   : f64[3]
  rstd = norm[2]   : f64[3]
  m2   = norm[3]   : f64[3]
  v2   = norm[4]   : f64[3]
  return y, mean, rstd, m2, v2
""")


@pytest.mark.parametrize("affine", [True, False])
def test_all_results_are_those_of_the_kernel(affine: bool) -> None:
    before = program(affine=affine)
    after = synchronise_batch_norm(before)
    assert counts(after)[NORM] == 0
    tensors = [torch.randn(8, 3, 5).double() * 4 + 2, *torch.rand(4, 3).double()]
    pairs = zip(run_graph(before.graph, tensors), run_graph(after.graph, tensors))
    assert all(float((one - other).abs().max()) < 1e-13 for one, other in pairs)


@pytest.mark.parametrize("mesh, training", [("dp=1", True), ("tp=2", True), ("dp=2", False)])
def test_the_kernel_stays_where_no_batch_is_split_or_nothing_is_learned(mesh: str, training: bool) -> None:
    before = program(mesh, training=training)
    assert str(synchronise_batch_norm(before)) == str(before)


def test_statistics_of_16_bits_are_computed_in_32() -> None:
    after = synchronise_batch_norm(program(dtype="bf16", affine=False))
    lines = str(after).splitlines()
    assert next(line for line in lines if "aten.mean.dim" in line).endswith("f32[1,3,1]")
    assert [line for line in lines if "aten.add.Tensor" in line][-1].endswith("f64[3]")
    assert counts(after)["aten._to_copy"] == 5, "x and the running mean there, y and both statistics back"


def results(x: Tensor, running_mean: Tensor) -> list[Tensor]:
    """Those of the layer without weight and bias, by the sums."""
    unused = torch.zeros(3).double()
    given = [x, unused, unused, running_mean, torch.ones(3).double()]
    return list(run_graph(synchronise_batch_norm(program(dtype="f32", affine=False)).graph, given))


def test_what_is_the_same_everywhere_has_a_variance_of_zero_after_rounding_too() -> None:
    x = (torch.rand(3) * 1e4).reshape(1, 3, 1).expand(8, 3, 5)
    y, _, inverse, *_ = results(x, torch.zeros(3).double())
    assert bool((inverse <= 1 / 0.01**0.5 + 1e-5).all()) and bool(y.isfinite().all())


def test_a_broken_running_mean_does_not_break_the_output() -> None:
    x, broken = torch.randn(8, 3, 5), torch.tensor([float("nan"), float("inf"), 0.0]).double()
    y, *_, running_mean, _ = results(x, broken)
    assert torch.allclose(y, torch.nn.functional.batch_norm(x, None, None, training=True, eps=0.01), atol=1e-5)
    assert not bool(running_mean[:2].isfinite().any()), "as torch has it"


@pytest.mark.parametrize("mesh", [Mesh(dp=2, tp=2), Mesh(dp_replicate=2, dp_shard=2)])
def test_two_collectives_for_each_layer_and_step(mesh: Mesh) -> None:
    """One in forward and one in backward; gradients of other parameters beside them."""
    sums = {norms: collectives(norms, mesh) for norms in (1, 3)}
    for graph in ("forward", "backward", "inference"):
        assert sums[3][graph] - sums[1][graph] == 2, (graph, sums)


def collectives(norms: int, mesh: Mesh) -> dict[str, int]:
    """Of each graph, the reductions over axes that split the batch."""
    layers = [nn.Linear(6, 6, bias=False)]
    for _ in range(norms):
        layers += [nn.BatchNorm1d(6), nn.Tanh()]
    compiled = compile_program(nn.Sequential(*layers, Sum()), mesh, Plan(), (torch.randn(12, 6),))
    assert isinstance(compiled, Program)
    sums = started_too(REDUCTIONS)
    return {
        name: sum(node.target in sums and node.args[1] != "tp" for node in graph.nodes)
        for name, graph in compiled.graphs.items()
    }


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.pow(3).sum()


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).pow(3).sum()  # type: ignore[no-any-return]


def test_a_split_batch_learns_the_statistics_of_the_whole() -> None:
    report = check(Normalised(), {"x": torch.randn(12, 6)}, Mesh(dp=3))
    assert report.worst <= TOLERANCE, report


@pytest.mark.parametrize("rows, offset, plan", [(7, 50.0, Plan()), (5, 0.0, Plan(zero=3)), (8, -3.0, Plan(zero=1))])
def test_so_does_one_that_the_ranks_do_not_divide_and_that_is_far_from_zero(
    rows: int, offset: float, plan: Plan
) -> None:
    report = check(Normalised(), {"x": torch.randn(rows, 6) + offset}, Mesh(dp=4), plan)
    assert report.worst <= TOLERANCE, report
