"""Parts as rows: the same on tensors and in a graph, what the runtime cuts, and back again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autopar.communication import pieces
from autopar.frontend.numerics import run_graph
from autopar.ir import shards
from autopar.ir.builder import Builder
from autopar.ir.layout import Split
from autopar.ir.node import output_node, value
from autopar.ir.parse import parse
from autopar.mesh import Mesh

CASES = [((4, 6), 0), ((4, 6), 1), ((5,), 0), ((2, 7, 3), 1), ((2, 3, 5), 2)]  # some divide, some do not


@pytest.mark.parametrize("ways", [1, 2, 4])
@pytest.mark.parametrize("shape, dim", CASES)
def test_on_tensors_they_are_what_the_runtime_cuts(shape: tuple[int, ...], dim: int, ways: int) -> None:
    x = torch.randn(shape)
    rows = shards.apart(shards.run, x, shape, dim, ways)
    assert torch.equal(rows, pieces.apart(x, Split(dim), ways).reshape(ways, -1))
    assert torch.equal(shards.together(shards.run, rows, shape, dim, ways), x)


@pytest.mark.parametrize("shape, dim", CASES)
def test_in_a_graph_they_are_the_same(shape: tuple[int, ...], dim: int) -> None:
    sizes = ",".join(map(str, shape))
    graph = parse(f"program mesh()\n  x = input : f32[{sizes}]\n  return x\n").graph
    (x, end), tensor = (next(iter(graph.nodes)), output_node(graph)), torch.randn(shape)
    op = Builder(before=end, mesh=Mesh())
    rows = shards.apart(op, x, shape, dim, 2)
    end.args = ((rows, shards.together(op, rows, shape, dim, 2)),)
    apart, together = run_graph(graph, [tensor])
    wanted: Tensor = shards.apart(shards.run, tensor, shape, dim, 2)
    assert torch.equal(apart, wanted) and tuple(apart.shape) == value(rows).shape
    assert torch.equal(together, tensor)
