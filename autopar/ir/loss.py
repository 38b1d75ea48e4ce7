"""The output of a model, by paths: the place of each tensor in it, and which of them is the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import InvariantError

NAME, FIRST = "loss", "0"  # the paths of a loss: in a mapping or a named tuple, in a tuple


def loss_position(paths: Sequence[str], is_candidate: Sequence[bool]) -> int | None:
    """The position of the loss among the values at ``paths`` of a model's output; None where there is none.

    Candidates are scalars with a gradient. Of several it is the one called ``loss``, else the first of a tuple
    (``(loss, logits)``, the convention of Hugging Face). Where neither exists, there is none: a guess would be trained
    on.
    """
    found = [position for position, candidate in enumerate(is_candidate) if candidate]
    if len(found) <= 1:
        return found[0] if found else None
    return next((position for name in (NAME, FIRST) for position in found if paths[position] == name), None)


def loss_of(output: Any) -> Tensor:
    """The loss in the output of a model, by the rule of :func:`loss_position`.

    Without gradients (in evaluation) any floating-point scalar is a candidate. Raises InvariantError where there is
    none, or where the choice is ambiguous.
    """
    leaves, spec = pytree.tree_flatten(output)
    scalars = [isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.is_floating_point() for leaf in leaves]
    learned = [scalar and leaf.requires_grad for scalar, leaf in zip(scalars, leaves)]
    position = loss_position(leaf_paths(spec), learned if any(learned) else scalars)
    if position is None:
        count = sum(learned if any(learned) else scalars)
        several = f", and {count} scalars of which none is called 'loss'" if count else ""
        raise InvariantError(
            f"a step needs a model that returns its loss, a scalar; this one returns {type(output).__name__}{several}\n"
            "Way out: pass labels, or compute the loss in a small nn.Module around the model."
        )
    found: Tensor = leaves[position]
    return found


def leaf_paths(spec: pytree.TreeSpec) -> list[str]:
    """The path of each leaf, as a user would write it: ``loss``, ``past.0``; a lone leaf is called ``0``."""
    return [path or FIRST for path in inner_paths(spec)]


def inner_paths(spec: pytree.TreeSpec) -> list[str]:
    """As :func:`leaf_paths`, but a lone leaf has the empty path: the suffix to a name."""
    if spec.is_leaf():
        return [""]
    children = spec.children()
    keys = spec.context if isinstance(spec.context, (list, tuple)) else getattr(spec.context, "_fields", None)
    if keys is None or len(keys) != len(children):
        keys = range(len(children))
    return [joined_path(str(key), path) for key, child in zip(keys, children) for path in inner_paths(child)]


def joined_path(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name
