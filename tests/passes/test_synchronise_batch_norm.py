"""Batch norm as sums: the numbers and gradients of torch's own kernel, in training mode and on split batches only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.check import TOLERANCE, check
from autopar.frontend.numerics import run_graph
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.passes.synchronise_batch_norm import synchronise_batch_norm
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
    assert next(line for line in lines if " add_" in line and "aten.add" in line).endswith("f64[3]")
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
