"""The sizes of a call, and calls like it of other sizes."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.calls.calls import Call, class_of, kind_of
from autopar.families.sizes import Shapes


def shapes_of(call: Call) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in call.tensors)


def general(call: Call) -> tuple[Hashable, ...]:
    """The kind of ``call`` without its sizes."""
    leaves: list[Hashable] = [
        (leaf.dim(), leaf.dtype, leaf.requires_grad, leaf.device, class_of(leaf))
        if isinstance(leaf, Tensor)
        else kind_of(leaf)
        for leaf in call.leaves
    ]
    return call.key[0], *leaves, call.rows_of_all


def resized(call: Call, shapes: Shapes) -> Call:
    """A call like ``call`` with tensors of other ``shapes``, and without data: twice a long batch may have no room."""
    given = iter(shapes)

    def empty(leaf: Tensor) -> Tensor:
        return leaf.new_empty(next(given), device="meta").requires_grad_(leaf.requires_grad)

    args, kwargs = pytree.tree_map_only(Tensor, empty, (call.args, call.kwargs))
    leaves = pytree.tree_leaves((args, kwargs))
    return Call(args, kwargs, leaves, (call.key[0], *map(kind_of, leaves)), call.rows_of_all)
