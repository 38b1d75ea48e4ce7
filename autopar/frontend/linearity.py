"""Whether a graph is linear in some of its inputs, told operator by operator; what cannot be told is not linear.

Each value is *fixed* (it depends on none of those inputs), *zero* (fixed, and known to be zeros) or *linear* in them.
A table says in which arguments an operator is jointly linear: the linear arguments must all be among those, and
what else is among them must be zero (``x + 1`` is affine, ``where(m, x, 0)`` is linear).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from autopar.ir.node import traced_value
from autopar.ir.operator_facts import is_random, is_view


class Kind(enum.IntEnum):
    ZERO = 0
    FIXED = 1
    LINEAR = 2
    AFFINE = 3


_FIRST = (frozenset({0}),)
_EITHER = (frozenset({0}), frozenset({1}))
_SUM = (frozenset({0, 1}),)
_WRITE = (frozenset({0, 3}),)

# operator -> the sets of argument positions in which it is jointly linear, the other arguments held fixed
_LINEAR: dict[str, tuple[frozenset[int], ...]] = {
    **dict.fromkeys(("add", "sub", "rsub", "slice_scatter", "select_scatter", "diagonal_scatter", "complex"), _SUM),
    **dict.fromkeys(("mul", "mm", "bmm", "mv", "dot", "matmul"), _EITHER),
    **dict.fromkeys(
        (
            "neg", "div", "clone", "_to_copy", "cat", "stack", "sum", "mean", "cumsum", "flip", "roll", "gather",
            "index", "index_select", "take", "repeat", "tril", "triu", "trace", "diag_embed", "embedding",
            "_conj", "_conj_physical", "_fft_r2c", "_fft_c2c", "_fft_c2r", "im2col", "col2im", "avg_pool2d",
            "_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "reflection_pad2d",
            "replication_pad2d", "pixel_shuffle", "pixel_unshuffle", "_reshape_copy", "lift_fresh_copy",
        ),
        _FIRST,
    ),
    **dict.fromkeys(("scatter", "scatter_add", "index_add", "index_copy", "index_fill"), _WRITE),
    "where": (frozenset({1, 2}),),
    "masked_fill": (frozenset({0, 2}),),
    "masked_scatter": (frozenset({0, 2}),),
    "index_put": (frozenset({0, 2}),),
    "constant_pad_nd": (frozenset({0, 2}),),
    "lerp": (frozenset({0, 1}),),
    **dict.fromkeys(("addmm", "addmv", "baddbmm", "addcmul"), (frozenset({0, 1}), frozenset({0, 2}))),
    "addcdiv": (frozenset({0, 1}),),
    "convolution": (frozenset({0, 2}), frozenset({1, 2})),
    "copy": (frozenset({1}),),
}  # fmt: skip
_ROUNDING = ("div.Tensor_mode", "div.Scalar_mode")
# operators that look at the shape of their first argument alone -> the position of what they are filled with, or it
_FILLED: dict[str, Any] = {
    **dict.fromkeys(("zeros_like", "new_zeros", "zero", "zeros"), Kind.ZERO),
    **dict.fromkeys(("ones_like", "new_ones", "empty_like", "new_empty", "new_empty_strided"), Kind.FIXED),
    "full_like": 1, "fill": 1, "full": 1, "new_full": 2, "scalar_tensor": 0,
}  # fmt: skip


def not_linear(graph: fx.GraphModule, inputs: Sequence[fx.Node]) -> str | None:
    """What makes the outputs of ``graph`` other than linear in ``inputs``, in words; None where they are linear."""
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
    """The kind of what ``node`` returns; None: not even affine, or nothing is known about its operator."""
    given = [_kind_of(argument, kinds) for argument in (*node.args, *node.kwargs.values())]
    linear = {position for position, kind in enumerate(given) if kind >= Kind.LINEAR}
    if not isinstance(node.target, torch._ops.OpOverload):  # getitem of what a split returns
        return given[0]
    name = node.target._schema.name.partition("::")[2]
    if name in _FILLED:
        filling = _FILLED[name]
        kind = filling if isinstance(filling, Kind) else given[filling]
        return kind if kind < Kind.LINEAR else None
    if name == "copy":  # what is written over does not matter
        given[0], linear = Kind.ZERO, linear - {0}
    groups = _groups(node, name)
    if not linear:
        return Kind.ZERO if _keeps_zero(groups, given) else Kind.FIXED
    if is_random(node.target) or not _is_continuous(node):
        return None
    rests = [[given[position] for position in group if position < len(given)] for group in groups if linear <= group]
    if any(Kind.FIXED not in rest and Kind.AFFINE not in rest for rest in rests):
        return Kind.LINEAR
    return Kind.AFFINE if rests else None


def _groups(node: fx.Node, name: str) -> tuple[frozenset[int], ...]:
    assert isinstance(node.target, torch._ops.OpOverload)
    if str(node.target).removeprefix("aten.") in _ROUNDING:
        return ()
    ours = node.target.namespace in ("aten", "prims")
    if is_view(node.target) or (ours and name.endswith(("_backward", "_backward_data"))):
        return _FIRST  # torch's own formulas are linear in their first argument, the gradient
    return _LINEAR.get(name, ()) if ours else ()


def _keeps_zero(groups: Sequence[frozenset[int]], given: Sequence[Kind]) -> bool:
    return any(all(given[position] is Kind.ZERO for position in group if position < len(given)) for group in groups)


def _is_continuous(node: fx.Node) -> bool:
    """Whether the results are numbers that can carry a gradient: a cast to integers is not linear."""
    tensors = [leaf for leaf in pytree.tree_leaves(traced_value(node)) if isinstance(leaf, Tensor)]
    return all(tensor.dtype.is_floating_point or tensor.dtype.is_complex for tensor in tensors)


def _kind_of(argument: Any, kinds: dict[fx.Node, Kind]) -> Kind:
    """The kind of an argument: of a node, a number, or a list of those."""
    leaves = pytree.tree_leaves(argument)
    found = {kinds[leaf] if isinstance(leaf, fx.Node) else Kind(bool(leaf)) for leaf in leaves if leaf is not None}
    return Kind.AFFINE if {Kind.FIXED, Kind.LINEAR} <= found else max(found, default=Kind.ZERO)
