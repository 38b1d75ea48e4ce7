"""Graphs that are read when somebody looks into them, and until then known by what they take and return.

A program out of the cache comes with the Python that was written of it before. A rank that runs this needs of a graph
its border alone; so the nodes stay bytes until anything else is asked of one of the graphs of the program.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from autopar.ir.node import Value, output_node, values


@dataclass(frozen=True)
class Port:
    """A placeholder, seen from outside: its name, the type of what it takes, and whether any node uses it."""

    name: str
    types: tuple[Value, ...]
    is_used: bool

    @property
    def value(self) -> Value:
        (only,) = self.types
        return only


@dataclass(frozen=True)
class Border:
    """What a graph takes, and the types of each of its results."""

    takes: tuple[Port, ...]
    returns: tuple[tuple[Value, ...], ...]


class Shelf:
    """The graphs of one program, as they are stored.

    Attributes:
        text: a digest of the text form of the whole program.
        code: the Python that was written of the graphs, for :mod:`autopar.runtime.written_code`; None where there is
            none, and from when the graphs are read on, since whoever looks at nodes may change them.
        others: gives graphs that the code needs, and which are no part of the program, from their bytes.
        content: gives a digest of the whole program as it is stored; None where it was not stored as a whole.
    """

    def __init__(
        self,
        text: str,
        code: Any,
        read: Callable[[], Sequence[fx.Graph]],
        others: Callable[[bytes], Sequence[fx.Graph]] | None = None,
        content: Callable[[], str] | None = None,
    ) -> None:
        self.text, self.code, self.others, self.content = text, code, others, content
        self._read, self._graphs = read, list[StoredGraph]()
        self._lock = threading.RLock()
        self.is_read = False

    def put(self, number: int, border: Border) -> StoredGraph:
        """The graph that comes back as number ``number``, which is the next one."""
        assert number == len(self._graphs), "graphs come in their order"
        graph = StoredGraph(self, number, border)
        self._graphs.append(graph)
        return graph

    def read(self) -> None:
        """Put their nodes into all graphs."""
        with self._lock:
            if self.is_read:
                return
            for graph, found in zip(self._graphs, self._read(), strict=True):
                graph.take_over(found)
            self.is_read, self.code, self.content, self._graphs = True, None, None, []
            del self._read


class StoredGraph(fx.Graph):
    """A graph on a shelf. It becomes an ordinary ``fx.Graph`` when it is read.

    Attributes:
        shelf: where it is.
        number: its place there.
        border: what it takes and returns.
    """

    def __init__(self, shelf: Shelf, number: int, border: Border) -> None:
        vars(self).update(shelf=shelf, number=number, border=border)  # without torch's, which are made when it is read

    def __getattr__(self, name: str) -> Any:
        self.shelf.read()
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.shelf.read()
        setattr(self, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.shelf.read()
        return self.__reduce_ex__(protocol)

    def take_over(self, read: fx.Graph) -> None:
        """Have the nodes of ``read``, and be like it."""
        for node in (vars(read)["_root"], *read.nodes):
            object.__setattr__(node, "graph", self)  # past the node, which would look for itself in the new graph
        vars(self).clear()
        vars(self).update(vars(read))
        object.__setattr__(self, "__class__", fx.Graph)


def shelf_of(graph: fx.Graph) -> Shelf | None:
    """Where ``graph`` is, if it is stored and nobody has looked into it."""
    return graph.shelf if isinstance(graph, StoredGraph) else None


def number_of(graph: fx.Graph) -> int:
    """Of a stored graph that nobody has looked into, its number on the shelf."""
    assert isinstance(graph, StoredGraph)
    number: int = graph.number
    return number


def border_of(graph: fx.Graph) -> Border:
    """What ``graph`` takes and returns; a stored one is not read for it."""
    if isinstance(graph, StoredGraph):
        border: Border = graph.border
        return border
    takes = [node for node in graph.nodes if node.op == "placeholder"]
    returned = output_node(graph).args[0]
    nodes = returned if isinstance(returned, (tuple, list)) else (returned,)
    ports = tuple([Port(node.name, values(node), bool(node.users)) for node in takes])
    return Border(ports, tuple([values(node) if isinstance(node, fx.Node) else () for node in nodes]))
