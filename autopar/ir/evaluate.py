"""The value of the part of a graph that depends on no input, without ever holding repeated elements.

A value is kept *compact*: a dim along which all slices are equal has size 1. Masks that Hugging Face code builds for
each row of the batch are the same for each row, so a mask of f32[8,1,4096,4096] is computed and held as
f32[1,1,4096,4096].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from autopar.ir.node import Value, value, values
from autopar.ir.operator_facts import is_pointwise, is_view, runnable
from autopar.ir.program import Program
from autopar.ir.tables import InputKind

aten = torch.ops.aten

# creation operators -> their fill value, from the node
FILLED: dict[Any, Callable[[fx.Node], Any]] = {
    aten.zeros.default: lambda node: 0,
    aten.zeros_like.default: lambda node: 0,
    aten.new_zeros.default: lambda node: 0,
    aten.ones.default: lambda node: 1,
    aten.ones_like.default: lambda node: 1,
    aten.new_ones.default: lambda node: 1,
    aten.full.default: lambda node: node.args[1],
    aten.full_like.default: lambda node: node.args[1],
    aten.new_full.default: lambda node: node.args[2],
    aten.scalar_tensor.default: lambda node: node.args[0],
    aten.empty.memory_format: lambda node: 0,
    aten.empty_like.default: lambda node: 0,
    aten.new_empty.default: lambda node: 0,
}


def known_constants(program: Program) -> dict[fx.Node, Tensor]:
    """The constants that have elements: those of a model without memory have none."""
    found = {node: program.constants[entry.target] for node, entry in program.placeholders(InputKind.CONSTANT)}
    return {node: tensor for node, tensor in found.items() if not isinstance(tensor, FakeTensor)}


class Evaluator:
    """Computes nodes in graph order; a value is dropped after its last use (``keep`` holds those needed later).

    ``known``: every node that will be computed, and constants with their tensors. ``largest``: the bytes of a value.
    """

    def __init__(self, known: Mapping[fx.Node, Tensor | None], keep: set[fx.Node], largest: int) -> None:
        self._found: dict[fx.Node, Any] = {
            node: compact(tensor) for node, tensor in known.items() if tensor is not None
        }
        self._waiting = {node: sum(user in known for user in node.users) for node in known}
        self._keep, self._largest = set(keep), largest
        self._created: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def compute(self, node: fx.Node) -> bool:
        """Whether ``node`` could be computed; a value too large is not, nor what is computed from it."""
        if any(source not in self._found for source in node.all_input_nodes):
            return False
        if self._bytes(node) > self._largest:
            self._keep.update(node.all_input_nodes)
            return False
        self._found[node] = self._run(node) if node.all_input_nodes else self._create(node)
        for source in node.all_input_nodes:
            self._waiting[source] -= 1
            if self._waiting[source] == 0 and source not in self._keep:
                del self._found[source]
        return True

    def _bytes(self, node: fx.Node) -> int:
        """Of the value, before repeated elements are dropped."""
        if node.target in FILLED or (is_view(node.target) and node.target is not aten.reshape.default):
            return 0
        if is_pointwise(node.target):
            shapes = [self._found[source].shape for source in node.all_input_nodes]
            return math.prod(torch.broadcast_shapes(*shapes)) * value(node).dtype.itemsize  # type: ignore[no-untyped-call]
        return sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in values(node))

    def has(self, node: fx.Node) -> bool:
        return node in self._found

    def result(self, node: fx.Node) -> Tensor:
        """The compact value of a node in ``keep``."""
        found: Tensor = self._found[node]
        return found

    def _create(self, node: fx.Node) -> Any:
        """What ``node`` makes of nothing; where another has made the same (positions, in each layer), that tensor."""
        written = f"{node.target} {node.args} {node.kwargs}"
        found = self._created.get(written)
        if found is None:
            found = self._run(node)
            if isinstance(found, Tensor):
                self._created[written] = found
        return found

    def _run(self, node: fx.Node) -> Any:
        if node.target in FILLED:
            kind = value(node)
            return torch.full([1] * len(kind.shape), FILLED[node.target](node), dtype=kind.dtype)
        assert callable(node.target)
        fetch = self._compact if is_pointwise(node.target) else self._full
        args, kwargs = fx.map_arg(node.args, fetch), fx.map_arg(node.kwargs, fetch)
        result = runnable(node.target)(*args, **kwargs)
        if isinstance(result, (list, tuple)):
            return type(result)(compact(item) if isinstance(item, Tensor) else item for item in result)
        return compact(result) if isinstance(result, Tensor) else result

    def _compact(self, node: fx.Node) -> Any:
        return self._found[node]

    def _full(self, node: fx.Node) -> Any:
        found, types = self._found[node], values(node)
        if isinstance(found, Tensor):
            return found.expand(types[0].shape)
        return type(found)(_expanded(item, kind) for item, kind in zip(found, types))


def _expanded(item: Any, kind: Value) -> Any:
    return item.expand(kind.shape) if isinstance(item, Tensor) else item


def compact(tensor: Tensor) -> Tensor:
    """The same values with size 1 for each dim along which all slices are equal."""
    for dim, size in enumerate(tensor.shape):
        if size < 2:
            continue
        first = tensor.narrow(dim, 0, 1)
        if tensor.stride(dim) != 0:
            if not torch.equal(tensor.narrow(dim, 1, 1), first):
                continue
            if not torch.equal(tensor.narrow(dim, 1, size - 1), tensor.narrow(dim, 0, size - 1)):
                continue
        tensor = first
    return tensor
