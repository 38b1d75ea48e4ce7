"""What one entry of the cache says: a program, with what it was made for and what it assumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from autopar.cache.assumptions import Assumption
from autopar.cache.names import Name
from autopar.cache.packing import may_be_packed
from autopar.cache.reasons import Unstorable
from autopar.cache.state import Questions
from autopar.ir.guards import Unavailable
from autopar.ir.value_guards import Look, ValueGuard, guard_of
from autopar.observation.code_names import Names
from autopar.observation.trace_record import Effect


@dataclass(frozen=True)
class Header:
    """Attributes:
    facts: the table of the key, each fact as a digest.
    assumptions: what has to hold of a model, in order.
    looks: what Python has seen in tensors.
    notes: warnings that compiling gave.
    """

    facts: dict[str, str]
    assumptions: tuple[Assumption, ...]
    looks: tuple[StoredGuard, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StoredGuard:
    """A :class:`ValueGuard` of plain sources: a position in the call, (path of a module, buffer), or a tensor."""

    graph: fx.Graph
    sources: tuple[int | tuple[str, str] | Tensor, ...]
    looks: tuple[Look, ...]


may_be_packed(Header, Assumption, Questions, Name, Names, Effect, Unavailable, StoredGuard)


def stored_guard(guard: ValueGuard, model: nn.Module) -> StoredGuard:
    """Raises Unstorable."""
    paths = {id(module._buffers): path for path, module in model.named_modules()}
    graph = guard.graph.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        raise Unstorable("what Python looks at in tensors is computed from a constant")
    return StoredGuard(graph, tuple(_source(one, paths) for one in guard.sources), guard.looks)


def _source(source: int | tuple[Any, str], paths: dict[int, str]) -> int | tuple[str, str] | Tensor:
    if isinstance(source, int):
        return source
    table, key = source
    if id(table) in paths:
        return paths[id(table)], key
    constant: Tensor = table[key]
    return constant


def live_guard(stored: StoredGuard, model: nn.Module) -> ValueGuard:
    """The inverse of :func:`stored_guard`, for a model with the same modules and buffers."""

    def source(one: int | tuple[str, str] | Tensor) -> int | tuple[Any, str]:
        if isinstance(one, int):
            return one
        if isinstance(one, Tensor):
            return {"constant": one}, "constant"
        return model.get_submodule(one[0])._buffers, one[1]

    return guard_of(stored.graph, [source(one) for one in stored.sources], stored.looks)
