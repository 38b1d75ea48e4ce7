"""Nodes that are made without torch's search through their arguments, and the tables of a graph."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from autopar.ir.fast_graph import called, calls_of, copied_node, created, is_sound


def test_nodes_of_graphs_are_what_torch_makes() -> None:
    mine, its = fx.Graph(), fx.Graph()
    for graph, make in ((mine, created), (its, fx.Graph.create_node)):
        x = make(graph, "placeholder", "input", (), {}, "input")
        first = make(graph, "call_function", torch.ops.aten.mul.Tensor, (x, 2), {}, "mul_3")
        with graph.inserting_before(first):
            made = [make(graph, "call_function", operator.add, (x, [x, 1]), {}, name) for name in ("mul", "mul_3")]
        if graph is mine:
            made.append(copied_node(graph, first, {x: made[1]}.__getitem__))
        else:
            made.append(graph.node_copy(first, {x: made[1]}.__getitem__))
        graph.output((first, *made))
        graph.lint()
    assert str(mine) == str(its) and [node.name for node in mine.nodes] == [node.name for node in its.nodes]
    assert called(mine) == [torch.ops.aten.mul.Tensor, operator.add]
    later = mine.create_node("call_function", operator.add, (1, 2), name="mul")
    assert later.name == its.create_node("call_function", operator.add, (1, 2), name="mul").name
    next(iter(mine.nodes)).append(later)
    calls = [node for node in mine.nodes if node.op == "call_function"]
    assert calls[0] is later and calls_of(mine, called(mine)) == calls
    mine.erase_node(later)
    assert later not in calls_of(mine, [operator.add])


def test_an_unsound_graph_is_seen() -> None:
    def swap(graph: fx.Graph) -> None:
        one, other = calls_of(graph, called(graph))[:2]
        other.append(one)

    def borrow(graph: fx.Graph) -> None:
        calls_of(graph, called(graph))[1].args = (next(iter(fx.symbolic_trace(nn.ReLU()).graph.nodes)),)

    def call_alike(graph: fx.Graph) -> None:
        one, other = calls_of(graph, called(graph))[:2]
        other.name = one.name

    for spoil in (swap, borrow, call_alike, None):
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(torch.neg, (graph.call_function(torch.relu, (x,)),)))
        if spoil is None:
            assert is_sound(graph)
            continue
        spoil(graph)
        with pytest.raises(RuntimeError):
            graph.lint()
        assert not is_sound(graph), spoil
