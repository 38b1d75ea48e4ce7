"""A builder: inserts operators into a graph next to a node, and knows the types of their results.

    op = Builder(before=node)
    scores = op(aten.matmul.default, op(aten.mul.Tensor, query, scale), op(aten.transpose.int, key, -2, -1))
    substitute(node, op(aten.softmax.int, scores, -1))

The types come from running the operator on tensors that have sizes and a dtype but no elements (torch's ``meta``
device). New nodes have the origin of the node that they are next to.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.fast_graph import created
from autopar.ir.node import Value, origin, set_origin, set_values, value, values
from autopar.ir.operator_facts import types_of
from autopar.ir.text import operator_name
from autopar.mesh import Mesh

META = torch.device("meta")
MOST_TYPES = 4096  # that are remembered
_TYPES: dict[Any, tuple[Value, ...]] = {}  # of calls in the graphs of ranks: layers and stages have equal ones


class Builder:
    """Inserts operators in front of one node, or after it, each after the one inserted before.

    Its knowledge of layouts depends on the graph:

    * The graph of a program (no ``mesh``): layouts describe whole tensors. Where all operands are whole, the result is
      whole, and its sizes follow from theirs. Where one is split or a pending sum, only a rule could tell the layout of
      the result; and a collective converts between layouts. The builder knows neither: both raise InvariantError unless
      ``like`` gives the type.
    * The graph that a rank runs (``mesh`` given): backward is written out, and sizes in arguments are local. Each
      operand counts with its local size on ``mesh``, and the result is declared whole at the resulting local size: the
      part that a rank holds is known, the tensor it is a part of is not. Where a node replaces another, ``like`` keeps
      that node's layout. No gradient flows through new nodes. Collectives are operators like any other.
    """

    def __init__(
        self, *, before: fx.Node | None = None, after: fx.Node | None = None, mesh: Mesh | None = None
    ) -> None:
        """Give one of ``before`` and ``after``; ``mesh`` for the graph of a rank, see above."""
        assert (before is None) != (after is None), "before one node, or after one"
        self._before, self._after, self._mesh = before, after, mesh

    def __call__(
        self,
        target: Any,
        *args: Any,
        like: fx.Node | Value | Sequence[Value] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """The new node ``target(*args, **kwargs)``.

        ``like``: a node or type (several for several results) that the result is like, in place of a computed one.
        ``name``: of the node, that of the operator unless given.
        Raises InvariantError if the operator does not take such operands, or ``like`` is missing where it is needed.
        """
        node = self._inserted(target, args, kwargs, name)
        try:
            set_values(node, *(self._computed(node) if like is None else _types(like)))
        except InvariantError:
            node.graph.erase_node(node)
            raise
        return node

    def reshape(self, source: fx.Node, *shape: int) -> fx.Node:
        """``source`` in another shape; itself where it has that shape."""
        if self.shape(source) == shape:
            return source
        return self(torch.ops.aten.reshape.default, source, list(shape))

    def cast(self, source: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``source`` in ``dtype``; itself where it has it. Its layout, split or not, stays."""
        kind = value(source)
        if kind.dtype == dtype:
            return source
        gradient = kind.requires_grad and dtype.is_floating_point
        return self(
            torch.ops.aten._to_copy.default,
            source,
            dtype=dtype,
            like=replace(kind, dtype=dtype, requires_grad=gradient),
        )

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The sizes of ``node`` in this graph; local ones in the graph of a rank."""
        layout = value(node).layout
        return layout.local_shape(self._mesh) if self._mesh is not None else layout.shape

    def _inserted(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None) -> fx.Node:
        schema = getattr(target, "_schema", None)
        name = name or (schema.name.partition("::")[2].strip("_") if schema else target.__name__)
        place = self._before or self._after
        assert place is not None
        graph = place.graph
        with graph.inserting_before(place) if self._before else graph.inserting_after(place):
            node = created(graph, "call_function", target, args, kwargs, name)
        set_origin(node, origin(place))
        if self._after:
            self._after = node
        return node

    def _computed(self, node: fx.Node) -> tuple[Value, ...]:
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node) and isinstance(position, int), node.format_node()
            return (values(source)[position],)
        if self._mesh is None:
            _check_whole(node)
            return tuple(types_of(node, self._run(node)))
        key = node.target, torch.get_default_dtype(), *self._looks(node.args), *self._looks(node.kwargs)
        if key not in _TYPES:
            found = types_of(node, self._run(node))
            if len(_TYPES) >= MOST_TYPES:
                _TYPES.clear()
            _TYPES[key] = tuple(replace(kind, requires_grad=False) for kind in found)
        return _TYPES[key]

    def _looks(self, item: Any) -> Iterator[Any]:
        """What determines the type of a result in the graph of a rank: equal for equal arguments only."""
        if isinstance(item, fx.Node):
            yield fx.Node
            for kind in values(item):
                yield self._sizes(kind)
                yield kind.dtype
        elif isinstance(item, (tuple, list)):
            yield len(item)
            for part in item:
                yield from self._looks(part)
        elif isinstance(item, dict):
            for name, part in item.items():
                yield name
                yield from self._looks(part)
        else:
            yield type(item)
            yield item

    def _run(self, node: fx.Node) -> Any:
        """The result of the operator, without elements."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._tensor)
        schema = getattr(node.target, "_schema", None)
        if schema is not None and any(argument.name == "device" for argument in schema.arguments):
            kwargs = {**kwargs, "device": META}
        assert callable(node.target)
        try:
            with torch.no_grad():
                return node.target(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
            raise InvariantError(
                f"{node.name}: {operator_name(node.target)} of "
                f"{', '.join(f'{source.name} {self._text(source)}' for source in node.all_input_nodes) or 'no tensor'}"
                f" has no type: {str(error).splitlines()[0] if str(error) else type(error).__name__}\n"
                "Likely fix: operands of other sizes, or say the type with like="
            ) from error

    def _tensor(self, node: fx.Node) -> Any:
        tensors = tuple(torch.empty(self._sizes(kind), dtype=kind.dtype, device=META) for kind in values(node))
        return tensors[0] if len(tensors) == 1 else tensors

    def _sizes(self, kind: Value) -> tuple[int, ...]:
        return kind.layout.local_shape(self._mesh) if self._mesh is not None else kind.shape

    def _text(self, node: fx.Node) -> str:
        return ", ".join(f"{str(kind.dtype).removeprefix('torch.')}{list(self._sizes(kind))}" for kind in values(node))


def _types(like: fx.Node | Value | Sequence[Value]) -> tuple[Value, ...]:
    if isinstance(like, fx.Node):
        return values(like)
    return (like,) if isinstance(like, Value) else tuple(like)


def _check_whole(node: fx.Node) -> None:
    """Raise InvariantError where the layout of the result does not follow from whole operands."""
    if node.target in comm.TARGETS:
        raise InvariantError(
            f"{node.name}: what {operator_name(node.target)} returns lies otherwise than its operand\n"
            "Likely fix: say its type with like="
        )
    for source in node.all_input_nodes:
        for kind in values(source):
            if kind.layout.axes or kind.layout.partial:
                raise InvariantError(
                    f"{node.name}: its operand {source.name} lies {kind.layout}, and only a rule knows what "
                    f"{operator_name(node.target)} makes of it\nLikely fix: say the type of the result with like="
                )
