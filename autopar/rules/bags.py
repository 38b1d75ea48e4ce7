"""Pooled look-ups in embedding tables: by bags, by columns of the table, by its rows."""

from __future__ import annotations

import math
from typing import Any

from autopar.ir.node import Node, value
from autopar.operators.bags import EMBEDDING_BAGS
from autopar.rules.factoring import ANY_SIZE, Call, Dims, Emit, Factoring


def bags(call: Call) -> Factoring:
    """Bags of rows of a table. Split by rows, each rank adds the rows that it has."""
    _, _, offsets, _, weights, rank, mode, *_ = call.args
    width, ragged = call.inputs[0][1], offsets is not None
    sizes = {"v": call.inputs[0][0], "h": width, "b": call.outputs[0][0], "l": call.inputs[1][-1], "o": ANY_SIZE}
    bag: tuple[str, ...] = ("b",) if sizes["b"] != 1 else ()
    rows: Dims = (("l",),) if ragged else (bag, ("l",))
    inputs: list[Dims] = [(("v",), ("h",)), rows, *([(("o",),), (bag,)] if ragged else [])]
    linear = [frozenset({0})]
    if weights is not None:
        linear.append(frozenset({len(inputs)}))
        inputs.append(rows)
    inputs += [()] if rank is not None else []
    whole = {"l", "o"} | ({"v"} if mode == "max" or rank is not None else set())
    return Factoring(
        tuple(inputs),
        ((bag, ("h",)),),
        sizes,
        whole=frozenset(whole),
        linear=() if mode == "max" else tuple(linear),
        uneven=frozenset({"v"}),
        plain=frozenset({"v", "b"}),
        rewrites={"v": _add_own_rows},
        contraction=True,
        work=math.prod(call.inputs[1]) * width,
    )


def _add_own_rows(emit: Emit, node: Node, axis: str, ways: int) -> Node:
    rank = emit.axis_index(axis)
    total = int(value(node.args[0]).shape[0])  # type: ignore[arg-type]
    return emit(node.target, (*node.args[:5], rank, *node.args[6:8], total), emit.partial(value(node), axis))


RULES: dict[Any, Any] = {
    EMBEDDING_BAGS: bags,
}
