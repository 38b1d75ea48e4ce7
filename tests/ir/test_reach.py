"""What stands before some nodes of a graph, and what behind them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from autopar.ir.parse import parse
from autopar.ir.reach import ancestors, descendants, made_only_of

GRAPH = parse("""\
program mesh(dp=1)
  w    = param w                 : f32[4]
  x    = input                   : f32[4]
  two  = aten.full([], 2.0)      : f32[]
  w_2  = aten.mul.Tensor(w, two) : f32[4]
  w_3  = aten.neg(w)             : f32[4]
  y    = aten.mul.Tensor(x, w_3) : f32[4]
  z    = aten.add.Tensor(y, y)   : f32[4]
  return z, w_2
""").graph
NODES = {node.name: node for node in GRAPH.nodes}


def names(nodes: Iterable[fx.Node]) -> set[str]:
    return {node.name for node in nodes}


def test_ancestors() -> None:
    z, y, w_3 = NODES["z"], NODES["y"], NODES["w_3"]
    assert names(ancestors([z])) == {"z", "y", "x", "w_3", "w"}
    assert names(ancestors([z], stop=[w_3])) == {"z", "y", "x"}
    assert names(ancestors([z], through=lambda node: node is not w_3)) == {"z", "y", "x", "w_3"}
    assert names(ancestors([z, y], through=lambda node: False)) == {"z", "y"}
    assert ancestors([]) == set()


def test_descendants() -> None:
    assert names(descendants([NODES["w"]])) == {"w_2", "w_3", "y", "z", "output"}
    assert names(descendants([NODES["x"], NODES["y"]])) == {"y", "z", "output"}


def test_what_is_made_of_some_nodes_alone() -> None:
    assert names(made_only_of(GRAPH, [NODES["w"]])) == {"w", "w_3"}
    assert names(made_only_of(GRAPH, [NODES["w"]], factories=True)) == {"w", "two", "w_2", "w_3"}
    assert names(made_only_of(GRAPH, [NODES["w"], NODES["x"]])) == {"w", "x", "w_3", "y", "z"}
