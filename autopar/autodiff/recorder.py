"""Record what torch runs, forward and backward, as one flat ``fx.Graph`` of functional aten operators.

A ``Recorder`` sits below autograd and above a ``FakeTensorMode``: every operator that reaches a kernel becomes a node,
nothing is computed and nothing is allocated. While recording it

* drops operators that only matter to autograd (detach, alias, our ``enter``, ``release`` and ``straight_through``),
* knows each view by its memory: ``t(t(x))`` is ``x``, and no view is recorded twice,
* shares equal pure operators (backward shares with forward only those that cost nothing to recompute),
* turns in-place operators into their functional forms; views of the changed memory get new nodes.

This is the one file that needs torch's ``FakeTensorMode`` and ``TorchDispatchMode`` for differentiation.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from autopar.autodiff.outline import Outline, strides_of_view
from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.fast_graph import created
from autopar.ir.layout import Layout
from autopar.ir.node import Node, Origin, Value, set_origin, set_values
from autopar.ir.operator_facts import UNSAFE_SPLITS, VIEWS, is_factory, is_random, is_view, writes
from autopar.mesh import Mesh
from autopar.operators.straight_through import STRAIGHT_THROUGH

aten = torch.ops.aten

TENSORS = (Tensor, Outline)
AnyTensor = Tensor | Outline

IDENTITIES = frozenset(  # below autograd they are their first argument
    (aten.detach.default, aten.alias.default, aten.lift_fresh.default, STRAIGHT_THROUGH, *comm.IDENTITIES)
)
_IN_PLACE_NAMES = {  # of ``pow.Scalar`` the number is the base
    "bernoulli_.float": aten.bernoulli.p,
    "float_power_.Scalar": aten.float_power.Tensor_Scalar,
    "float_power_.Tensor": aten.float_power.Tensor_Tensor,
    "floor_divide_.Tensor": aten.floor_divide.default,
    "ldexp_.default": aten.ldexp.Tensor,
    "normal_.default": aten.normal_functional.default,
    "pow_.Scalar": aten.pow.Tensor_Scalar,
    "pow_.Tensor": aten.pow.Tensor_Tensor,
    "transpose_.default": aten.transpose.int,
}


def fake_mode() -> FakeTensorMode:
    """A mode under which tensors have a shape, dtype and strides, but no memory."""
    return FakeTensorMode()


def _types(target: Any) -> list[str]:
    return [str(argument.type) for argument in target._schema.arguments]


@functools.cache
def functional_form(target: Any) -> Any:
    """The operator that returns what the in-place operator ``target`` writes."""
    packet, overload = target._schema.name.split("::")[1], target._overloadname
    found = _IN_PLACE_NAMES.get(f"{packet}.{overload}")
    if found is None and packet.endswith("_"):
        found = getattr(getattr(aten, packet[:-1], None), overload, None)
    if found is None or _types(found) != _types(target):
        raise InvariantError(f"{target} writes to its arguments and has no functional form: return a tensor instead")
    return found


@functools.lru_cache(maxsize=4096)
def _type(dtype: torch.dtype, shape: tuple[int, ...]) -> Value:
    return Value(dtype, Layout.whole(shape))


def _frozen(item: Any) -> Any:
    """A hashable key that keeps 1, 1.0 and True apart."""
    if isinstance(item, (list, tuple)):
        return tuple(map(_frozen, item))
    return item if isinstance(item, Node) else (type(item), item)


def _can_view(tensor: Tensor | Outline, like: Tensor | Outline) -> bool:
    """Whether ``tensor.view(like.shape)`` is possible and has the strides of ``like``."""
    if tensor.is_contiguous():
        return like.is_contiguous()
    if isinstance(tensor, Outline) or isinstance(like, Outline):
        assert isinstance(tensor, Outline) and isinstance(like, Outline)
        return strides_of_view(tensor.shape, tensor.strides, like.shape) == like.strides
    try:
        return bool(aten.view.default(tensor, like.shape).stride() == like.stride())
    except (RuntimeError, ValueError):
        return False


class Names:
    """Names of nodes by their operators, numbered in the order in which they are asked for; none of ``reserved``."""

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self._taken = set(reserved)
        self._counts: Counter[str] = Counter()

    def name(self, func: Any) -> str:
        base = func._schema.name.split("::")[1] if isinstance(func, torch._ops.OpOverload) else func.__name__
        base = name = base.strip("_")
        while name in self._taken:
            self._counts[base] += 1
            name = f"{base}_{self._counts[base]}"
        self._taken.add(name)
        return name


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every operator that runs under it into ``graph``; see the top of this file.

    ``origin`` is given to the nodes recorded from now on, and ``block`` (if any) is noted for them in ``blocks``.
    ``expected`` is an operator and the name of its node, in case it is recorded; ``reserved`` names are given to no
    other node. Collectives on axes of size 1 are dropped.
    ``backward()`` starts the backward phase: ``forward_nodes`` are those recorded before.
    """

    def __init__(self, graph: fx.Graph, mesh: Mesh | None = None, reserved: Iterable[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.mesh = graph, mesh
        self.origin = Origin()
        self.expected: tuple[Any, str] = (None, "")
        self._names = Names(reserved)
        self.block: int | None = None
        self.blocks: dict[Node, int] = {}
        self.forward_nodes: frozenset[Node] = frozenset()
        self._paused = False
        self._nodes: dict[int, Node] = {}  # id(tensor) -> node
        self._alive: list[AnyTensor] = []  # keeps those ids, and the storages' addresses, unique
        self._views: dict[Any, Node] = {}  # memory, sizes, strides -> node
        self._below: dict[int, AnyTensor] = {}  # id(result of a reshape) -> what was reshaped
        self._first: dict[int, Tensor] = {}  # storage -> the first tensor on it
        self._equal: dict[Any, Node] = {}
        self._free: dict[Any, Node] = {}  # of _equal, those that cost nothing to recompute

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no wrapper around each dispatch: nothing is compiled here

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context, nothing is recorded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    # tensors and nodes

    def placeholder(self, name: str, tensor: AnyTensor) -> Node:
        node = self.graph.placeholder(name)
        self._finish(node, tensor)
        self._bind(tensor, node)
        return node

    def node_of(self, tensor: AnyTensor) -> Node:
        found = self._nodes.get(id(tensor))
        if found is None:
            raise InvariantError(f"a tensor of shape {list(tensor.shape)} comes from outside the graph ({self.origin})")
        return found

    def backward(self) -> None:
        self.forward_nodes, self.expected = frozenset(self.graph.nodes), (None, "")
        self._equal = dict(self._free)

    def memory(self, tensor: AnyTensor) -> int:
        return tensor.memory if isinstance(tensor, Outline) else int(tensor.untyped_storage()._cdata)

    def geometry(self, tensor: AnyTensor) -> Any:
        if isinstance(tensor, Outline):
            return (tensor.memory, tensor.kind, tensor.offset)
        flags = (tensor.dtype, tensor.is_conj(), tensor.is_neg())
        return (self.memory(tensor), flags, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _bind(self, tensor: AnyTensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        if isinstance(tensor, Tensor):
            self._first.setdefault(self.memory(tensor), tensor)
        self._views.setdefault(self.geometry(tensor), node)

    def _finish(self, node: Node, result: Any) -> None:
        leaves = [result] if isinstance(result, TENSORS) else pytree.tree_leaves(result)
        tensors = [item for item in leaves if isinstance(item, TENSORS)]
        set_values(node, *(_type(item.dtype, tuple(item.shape)) for item in tensors))
        set_origin(node, self.origin)

    # operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func in IDENTITIES or (self.mesh is not None and comm.does_nothing(func, args, self.mesh)):
            return self.identity(func, args[0])
        if func is aten.pow.Tensor_Scalar and args[1] == 1 and args[0].is_floating_point():
            return self.identity(func, args[0])  # from the derivative of a square
        if writes(func):
            return self.in_place(func, args, kwargs)
        run = comm.SHAPES.get(func, func)  # at once: torch remembers results of fake tensors for its own operators only
        result = run(*args, **kwargs)
        if func in UNSAFE_SPLITS:
            func, result = UNSAFE_SPLITS[func], tuple(part.clone() for part in result)
        self.record(func, args, kwargs, result)
        return result

    def record(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """Note that ``func(*args, **kwargs)`` gave ``result``, a tensor or a tuple or list of tensors."""
        if isinstance(result, TENSORS):
            func, args, kwargs = self._plainest(func, args, kwargs, result)
            known = self._views.get(self.geometry(result)) if is_view(func) else None
            self._bind(result, known or self._node(func, args, kwargs, result))
            return
        if not isinstance(result, (tuple, list)):
            return  # a size or a flag that torch reads
        node = self._node(func, args, kwargs, result)
        for position, item in enumerate(result):
            if isinstance(item, TENSORS):
                self._bind(item, self._part(node, position, item))

    def _plainest(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: AnyTensor) -> Any:
        """The same operator in its simplest form: a view of a view is a view of the first tensor."""
        if func in VIEWS:
            source = args[0]
            while (below := self._below.get(id(source))) is not None and _can_view(below, result):
                source = below
            self._below[id(result)] = source
            return aten.view.default, (source, list(result.shape)), {}
        if "device" in kwargs and args and isinstance(args[0], TENSORS):  # a result on its argument's device
            kwargs = {key: item for key, item in kwargs.items() if key not in ("device", "layout", "pin_memory")}
        return func, args, kwargs

    def _part(self, node: Node, position: int, item: AnyTensor) -> Node:
        key = (node, position)
        if key not in self._equal:
            self._equal[key] = self._call(operator.getitem, key, {}, item)
            if is_view(node.target):
                self._free[key] = self._equal[key]
        return self._equal[key]

    def _node(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> Node:
        args, kwargs = self._as_nodes(tuple(args)), self._as_nodes(kwargs)
        key = None if is_random(func) else (func, _frozen(args), tuple((k, _frozen(v)) for k, v in kwargs.items()))
        if key is not None and key in self._equal:
            return self._equal[key]
        node = self._call(func, args, kwargs, result)
        if key is not None:
            self._equal[key] = node
            if is_view(func) or is_factory(func):
                self._free[key] = node
        return node

    def _call(self, func: Any, args: Any[Any, ...], kwargs: dict[str, Any], result: Any) -> Node:
        node = created(self.graph, "call_function", func, args, kwargs, self._name(func))
        self._finish(node, result)
        if self.block is not None:
            self.blocks[node] = self.block
        return node

    def _name(self, func: Any) -> str:
        target, name = self.expected
        if func is target:
            self.expected = (None, "")
            return name
        return self._names.name(func)

    def _as_nodes(self, item: Any) -> Any:
        if isinstance(item, TENSORS):
            return self.node_of(item)
        if isinstance(item, (list, tuple)):
            return type(item)(map(self._as_nodes, item))
        if isinstance(item, dict):
            return {key: self._as_nodes(value) for key, value in item.items()}
        return item

    def identity(self, func: Any, source: Tensor) -> Tensor:
        if func is aten.lift_fresh.default and id(source) not in self._nodes:
            return self.constant(source)
        result: Tensor = aten.alias.default(source)
        self.same(source, result)
        return result

    def same(self, source: AnyTensor, result: AnyTensor) -> None:
        """Note that ``result`` is another name of ``source``."""
        self._bind(result, self.node_of(source))

    def constant(self, source: Tensor) -> Tensor:
        """A number that Python code made into a tensor."""
        if source.dim():
            raise InvariantError(f"a constant of shape {list(source.shape)} is made in {self.origin}: make it an input")
        with _disable_current_modes():
            number = source.item()
        kwargs = {"dtype": source.dtype}
        result: Tensor = aten.full.default([], number, **kwargs)
        self.record(aten.full.default, ([], number), kwargs, result)
        return result

    def in_place(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        functional, changed = functional_form(func), args[0]
        node = self._node(functional, args, kwargs, changed)
        func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:  # squeeze_: other sizes, and nothing is written
            self._finish(node, changed)
            self._nodes[id(changed)] = node
            return changed
        memory, first = self.memory(changed), self._first[self.memory(changed)]
        base = node
        if self.geometry(changed) != self.geometry(first):
            where = (list(changed.shape), list(changed.stride()), changed.storage_offset())
            base = self._call(aten.as_strided_scatter.default, (self.node_of(first), node, *where), {}, first)
        self._views = {key: view for key, view in self._views.items() if key[0] != memory}
        for tensor in [one for one in self._alive if isinstance(one, Tensor) and self.memory(one) == memory]:
            self._nodes[id(tensor)] = self._after_change(tensor, first, base, changed, node)
        return changed

    def changed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[AnyTensor]) -> None:
        """Note that ``func`` writes into ``args[0]``, of which ``names`` are all tensors that share its memory."""
        node = self._node(functional_form(func), args, kwargs, args[0])
        self._views[self.geometry(args[0])] = node
        for tensor in names:
            self._nodes[id(tensor)] = node

    def _after_change(self, tensor: Tensor, first: Tensor, base: Node, changed: Tensor, node: Node) -> Node:
        """The node of a tensor whose memory has changed: ``base`` is the new value of the ``first`` tensor on it."""
        geometry = self.geometry(tensor)
        if geometry == self.geometry(changed):
            return self._views.setdefault(geometry, node)
        if geometry == self.geometry(first):
            return self._views.setdefault(geometry, base)
        if geometry not in self._views:
            where = (list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
            self._views[geometry] = self._call(aten.as_strided.default, (base, *where), {}, tensor)
        return self._views[geometry]
