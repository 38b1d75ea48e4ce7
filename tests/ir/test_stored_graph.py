"""Graphs that are read when somebody looks: their borders before, and ordinary graphs afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from autopar.ir.layout import Layout
from autopar.ir.node import Value, set_values
from autopar.ir.stored_graph import Shelf, StoredGraph, border_of, shelf_of

KIND = Value(torch.float32, Layout.whole([2, 3]))


def graph() -> fx.Graph:
    made = fx.Graph()
    x, unused = made.placeholder("x"), made.placeholder("unused")
    y = made.call_function(torch.relu, (x,))
    for node in (x, unused, y):
        set_values(node, KIND)
    made.output((y, x))
    return made


def stored() -> tuple[Shelf, StoredGraph, list[int]]:
    """A shelf with two graphs, the first of these, and how often they were read."""
    times: list[int] = []

    def read() -> list[fx.Graph]:
        times.append(1)
        return [graph(), graph()]

    shelf = Shelf("text", b"code", read)
    first = shelf.put(0, border_of(graph()))
    shelf.put(1, border_of(graph()))
    return shelf, first, times


LOOKS: dict[str, Callable[[Any], Any]] = {
    "nodes": lambda one: len(one.nodes),
    "text": str,
    "a copy": copy.deepcopy,
    "a shallow copy": copy.copy,
    "bytes": pickle.dumps,
    "an attribute is set": lambda one: setattr(one, "owning_module", None),
    "what there is not": lambda one: getattr(one, "nothing", None),
}


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_has_an_ordinary_graph(look: str) -> None:
    shelf, first, times = stored()
    LOOKS[look](first)
    assert times == [1] and shelf.is_read and shelf.code is None and shelf_of(first) is None
    assert type(first) is fx.Graph and str(first) == str(graph())


def test_its_border_is_known_before() -> None:
    shelf, first, times = stored()
    ports = border_of(first).takes
    assert [(port.name, port.is_used, port.value) for port in ports] == [("x", True, KIND), ("unused", False, KIND)]
    assert border_of(first).returns == ((KIND,), (KIND,)) == border_of(graph()).returns
    assert shelf_of(first) is shelf and not times


def test_it_can_be_rewritten_as_any_other() -> None:
    """torch's graphs know their nodes in several places, and nodes their graph."""
    _, first, _ = stored()
    assert all(node.graph is first for node in first.nodes)
    relu = next(node for node in first.nodes if node.op == "call_function")
    with first.inserting_after(relu):
        other = first.call_function(torch.neg, (relu,))
    relu.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
    assert first.find_nodes(op="call_function", target=torch.neg) == [other]
    relu.name = "renamed"
    first.erase_node(next(node for node in first.nodes if node.name == "unused"))
    first.lint()
    assert [node.name for node in first.nodes] == ["x", "renamed", "neg", "output"]
