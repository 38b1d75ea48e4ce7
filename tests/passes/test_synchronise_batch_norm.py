"""Batch norm as sums: the numbers and gradients of torch's own kernel, in training mode and on split batches only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.check import TOLERANCE, check
from autopar.compiler import compile_program
from autopar.frontend.numerics import run_graph
from autopar.ir import collectives as comm
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes.synchronise_batch_norm import synchronise_batch_norm
from tests.passes.canonical import counts

NORM = "aten._native_batch_norm_legit_functional"


def program(
    mesh: str = "dp=2",
    dtype: str = "f64",
    training: bool = True,
    affine: bool = True,
    rows: int = 8,
    held: str = "f64",
) -> Program:
    w, b = ("w", "b") if affine else ("None", "None")
    return parse(f"""program mesh({mesh})
  x    = input     : {dtype}[{rows},3,5]
  w    = param w   : f64[3]
  b    = param b   : f64[3]
  m    = buffer m  : {held}[3]
  v    = buffer v  : {held}[3]
  norm = {NORM}(x, {w}, {b}, m, v, {training}, 0.3, 0.01) : ({dtype}[{rows},3,5], f64[3], f64[3], {held}[3], {held}[3])
  y    = norm[0]   : {dtype}[{rows},3,5]
  mean = norm[1]   : f64[3]
  rstd = norm[2]   : f64[3]
  m2   = norm[3]   : {held}[3]
  v2   = norm[4]   : {held}[3]
  return y, mean, rstd, m2, v2
""")


@pytest.mark.parametrize("rows", [8, 9])  # of 9, two ranks cannot have equal numbers
@pytest.mark.parametrize("affine", [True, False])
def test_all_results_are_those_of_the_kernel(affine: bool, rows: int) -> None:
    before = program(affine=affine, rows=rows)
    after = synchronise_batch_norm(before)
    assert counts(after)[NORM] == 0
    assert counts(after)["aten.var_mean.correction"] == (rows == 8)
    tensors = [torch.randn(rows, 3, 5).double() * 4 + 2, *torch.rand(4, 3).double()]
    pairs = zip(run_graph(before.graph, tensors), run_graph(after.graph, tensors))
    assert all(float((one - other).abs().max()) < 1e-13 for one, other in pairs)


@pytest.mark.parametrize("mesh, training", [("dp=1", True), ("tp=2", True), ("dp=2", False)])
def test_the_kernel_stays_where_no_batch_is_split_or_nothing_is_learned(mesh: str, training: bool) -> None:
    before = program(mesh, training=training)
    assert str(synchronise_batch_norm(before)) == str(before)


def test_statistics_of_16_bits_are_computed_in_32() -> None:
    after = synchronise_batch_norm(program(dtype="bf16", affine=False))
    lines = str(after).splitlines()
    assert next(line for line in lines if "aten.mean.dim" in line).endswith("f32[2,1,3,1]")
    assert len([line for line in lines if "aten.add" in line and line.endswith("f64[3]")]) == 2
    assert counts(after)["aten._to_copy"] == 4, "x there, y back, both statistics to the dtype of the running ones"


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).pow(3).sum()  # type: ignore[no-any-return]


def test_a_split_batch_learns_the_statistics_of_the_whole() -> None:
    report = check(Normalised(), {"x": torch.randn(12, 6)}, Mesh(dp=3))
    assert report.worst <= TOLERANCE, report


@pytest.mark.parametrize("mesh, axis", [("dp=2", "dp"), ("dp=4", "dp"), ("dp_replicate=2,dp_shard=2", "dp_replicate")])
def test_a_layer_takes_two_collectives_a_step(mesh: str, axis: str) -> None:
    """The moments of all groups of rows are gathered at once, the gradients of mean and deviation summed at once."""
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = Summed(body)
    batch = {"x": torch.randn(8, 2, 7, 7)}
    role = compile_program(model, Mesh.parse(mesh), None, (), batch).parts[0].required_role
    assert role.backward is not None
    sent = [
        (comm.moving(node.target), comm.axes_over(node))
        for graph in (role.forward, role.backward)
        for node in graph.nodes
        if comm.moving(node.target) is not None
    ]
    names = [name for name, axes in sent if axis in axes]
    assert names.count("all_gather") == 2, sent  # one for each layer
    assert names.count("all_reduce") == 2 + 2, sent  # one for each layer; the loss, all gradients
    report = check(model, batch, Mesh.parse(mesh))
    assert report.worst <= TOLERANCE, report


class Summed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).pow(3).sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mesh", ["dp=2", "dp=2,tp=3", "tp=2"])
def test_layers_without_running_statistics(mesh: str) -> None:
    """``track_running_stats=False``; they take those of the batch in evaluation too."""
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6, track_running_stats=False, affine=False)
    body = nn.Sequential(nn.Linear(4, 6), norms[0], nn.Tanh(), nn.Linear(6, 6), norms[1].eval())
    assert check(Summed(body), {"x": torch.randn(8, 4)}, Mesh.parse(mesh)).worst <= TOLERANCE


def test_a_large_mean_loses_nothing() -> None:
    """In float32: the deviation is a ten-thousandth of the mean, and running statistics say nothing of either."""
    before = program(dtype="f32", affine=False, held="f32")
    x, rest = torch.randn(8, 3, 5) * 0.1 + 1000, torch.zeros(4, 3)
    mine, its = (run_graph(one.graph, [x, *rest])[0] for one in (synchronise_batch_norm(before), before))
    exact = run_graph(program(affine=False).graph, [x.double(), *rest.double()])[0]
    assert float((mine - exact).abs().max()) <= 2 * float((its - exact).abs().max()) + 1e-5
