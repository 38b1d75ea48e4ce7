"""A loss for a model that returns none: the model keeps its modules and the names of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from autopar.errors import unknown_name

NONE, AUTO = "none", "auto"


def mean_square(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The mean square of the elements of every floating tensor that the model returns, added up."""
    return sum((leaf.square().mean() for leaf in _floating(output)), start=_floating(output)[0].new_zeros(()))


def next_token(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Cross entropy of logits (B, T, V) at each position with the token (B, T) that comes next."""
    logits = _floating(output)[0]
    tokens = next(value for value in inputs.values() if _is_of_tokens(value, logits))
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


LOSSES: dict[str, Callable[[Any, Mapping[str, Any]], Tensor]] = {"mean-square": mean_square, "next-token": next_token}
WORDS = {
    "mean-square": "the mean square of its outputs",
    "next-token": "the cross entropy of its logits with the next token",
}


def has_loss(output: Any) -> bool:
    """Whether a scalar with a gradient is among what the model returned."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return any(leaf.dim() == 0 and leaf.is_floating_point() and leaf.requires_grad for leaf in leaves)


def fitting_loss(output: Any, inputs: Mapping[str, Any], tables: Mapping[str, int]) -> str | None:
    """The name of the loss that fits what the model returned: next tokens for logits of tokens, else a mean square.

    ``tables``: of inputs that index one, its rows: logits of fewer classes are none of its tokens. None where nothing
    that the model returned has a gradient.
    """
    floating = [leaf for leaf in _floating(output) if leaf.requires_grad]
    if not floating:
        return None
    fits = any(
        _is_of_tokens(value, floating[0]) and max(tables.get(name, 1), int(value.max()) + 1) <= floating[0].shape[2]
        for name, value in inputs.items()
    )
    return "next-token" if fits else "mean-square"


def with_loss(model: nn.Module, name: str) -> nn.Module:
    """``model`` itself, made to return ``{"loss", "output"}``. Raises ValueError for an unknown loss."""
    if name not in LOSSES:
        raise ValueError(unknown_name("there is no loss", name, (AUTO, NONE, *LOSSES)))
    kind, loss = type(model), LOSSES[name]

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> dict[str, Any]:
        output = kind.forward(self, *args, **inputs)
        return {"loss": loss(output, {**{str(n): value for n, value in enumerate(args)}, **inputs}), "output": output}

    members = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (kind,), members)
    return model


def _floating(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_of_tokens(value: Any, logits: Tensor) -> bool:
    return (
        isinstance(value, Tensor) and logits.dim() == 3 and value.shape == logits.shape[:2]
        and value.shape[1] > 1 and not value.is_floating_point() and value.dtype.itemsize > 1
    )  # fmt: skip
