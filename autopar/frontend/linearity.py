"""Whether a graph is linear in some of its inputs, decided operator by operator; in doubt it is not linear.

Each value is *fixed* (it depends on none of those inputs), *zero* (fixed, and known to be zeros) or *linear* in them.
A table lists the arguments in which an operator is jointly linear: the linear arguments must all be among those, and
the others among them must be zero (``x + 1`` is affine, ``where(m, x, 0)`` is linear).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autopar.ir.node import traced_value
from autopar.ir.operator_facts import Groups, bare_name, is_overload, is_random, linear_in


class Kind(enum.IntEnum):
    ZERO = 0
    FIXED = 1
    LINEAR = 2
    AFFINE = 3


# operators that look at the shape of their first argument alone -> the position of what they are filled with, or it
_FILLED: dict[str, Any] = {
    **dict.fromkeys(("zeros_like", "new_zeros", "zero", "zeros"), Kind.ZERO),
    **dict.fromkeys(("ones_like", "new_ones", "empty_like", "new_empty", "new_empty_strided"), Kind.FIXED),
    "full_like": 1, "fill": 1, "full": 1, "new_full": 2, "scalar_tensor": 0,
}  # fmt: skip


def not_linear(graph: fx.GraphModule, inputs: Sequence[fx.Node]) -> str | None:
    """The reason why the outputs of ``graph`` are not linear in ``inputs``, in words; None where they are linear."""
    kinds: dict[fx.Node, Kind] = dict.fromkeys(inputs, Kind.LINEAR)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            kinds.setdefault(node, Kind.FIXED)
        elif node.op == "get_attr":
            kinds[node] = Kind.ZERO if is_zero(getattr(graph, node.target)) else Kind.FIXED
        elif node.op == "call_function":
            found = _kind(node, kinds)
            if found is Kind.AFFINE:
                return f"{node.target} adds something to the incoming gradient that does not depend on it"
            if found is None:
                return f"it passes the incoming gradient through {node.target}, which is not linear, or not known to be"
            kinds[node] = found
        elif node.op == "output":
            for position, result in enumerate(pytree.tree_leaves(node.args[0])):
                if isinstance(result, fx.Node) and kinds[result] is Kind.FIXED:
                    return f"what it returns for input {position} does not depend on the incoming gradient"
    return None


def is_zero(tensor: Tensor) -> bool:
    """Whether a constant of a traced graph is known to be zeros."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    with _disable_current_modes():
        return known is not None and not known.any().item()


def _kind(node: fx.Node, kinds: dict[fx.Node, Kind]) -> Kind | None:
    """The kind of the result of ``node``; None where it is not even affine, or the operator is unknown."""
    given = [_kind_of(argument, kinds) for argument in (*node.args, *node.kwargs.values())]
    linear = {position for position, kind in enumerate(given) if kind >= Kind.LINEAR}
    if not is_overload(node.target):  # getitem of the result of a split
        return given[0]
    name = bare_name(node.target)
    if name in _FILLED:
        filling = _FILLED[name]
        kind = filling if isinstance(filling, Kind) else given[filling]
        return kind if kind < Kind.LINEAR else None
    if name == "copy":  # the values that are overwritten do not matter
        given[0], linear = Kind.ZERO, linear - {0}
    groups = linear_in(node.target)
    if not linear:
        return Kind.ZERO if _keeps_zero(groups, given) else Kind.FIXED
    if is_random(node.target) or not _is_continuous(node):
        return None
    rests = [[given[position] for position in group if position < len(given)] for group in groups if linear <= group]
    if any(Kind.FIXED not in rest and Kind.AFFINE not in rest for rest in rests):
        return Kind.LINEAR
    return Kind.AFFINE if rests else None


def _keeps_zero(groups: Groups, given: Sequence[Kind]) -> bool:
    return any(all(given[position] is Kind.ZERO for position in group if position < len(given)) for group in groups)


def _is_continuous(node: fx.Node) -> bool:
    """Whether the results can carry a gradient: a cast to integers is not linear."""
    tensors = [leaf for leaf in pytree.tree_leaves(traced_value(node)) if isinstance(leaf, Tensor)]
    return all(tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in tensors)


def _kind_of(argument: Any, kinds: dict[fx.Node, Kind]) -> Kind:
    """The kind of an argument: of a node, a number, or a list of those."""
    leaves = pytree.tree_leaves(argument)
    found = {kinds[leaf] if isinstance(leaf, fx.Node) else Kind(bool(leaf)) for leaf in leaves if leaf is not None}
    return Kind.AFFINE if {Kind.FIXED, Kind.LINEAR} <= found else max(found, default=Kind.ZERO)
