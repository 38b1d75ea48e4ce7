"""A loss for a model that returns none: the model keeps its modules and the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Of logits (B, C, ...) with classes (B, ...), or with what each class is to get (B, C, ...)."""
    return functional.cross_entropy(_floating(output)[0], target)


def squared_error(output: Any, target: Tensor) -> Tensor:
    """The mean square of the difference of the first floating tensor that the model returns from ``target``."""
    return functional.mse_loss(_floating(output)[0], target)


LOSSES: dict[str, Callable[[Any, Mapping[str, Any]], Tensor]] = {"mean-square": mean_square, "next-token": next_token}
OF_TARGETS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "squared-error": squared_error,
}
WORDS = {
    "mean-square": "the mean square of its outputs",
    "next-token": "the cross entropy of its logits with the next token",
    "cross-entropy": "the cross entropy of its output with '{}'",
    "squared-error": "the mean squared difference of its output from '{}'",
}


@dataclass(frozen=True)
class Target:
    """An entry of a batch that is for the loss and not for the model: its name, and its place where batches are tuples;
    None where they are dicts.
    """

    name: str
    place: int | None = None


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


def fitting_loss_of_target(output: Any, target: Any) -> str:
    """The name of the loss that compares what the model returned with ``target``: cross entropy with classes, a squared
    error where both are numbers of one shape. Raises ValueError where neither fits.
    """
    first = next(iter(_floating(output)), None)
    if isinstance(target, Tensor) and first is not None:
        if not target.is_floating_point() and target.shape == (*first.shape[:1], *first.shape[2:]):
            return "cross-entropy"
        if target.is_floating_point() and target.shape == first.shape:
            return "squared-error"
    shapes = "what it returns" if first is None else f"its output {list(first.shape)}"
    raise ValueError(
        f"no loss fits {shapes} and what the batch has beside the inputs\nWay out: a model that returns its loss."
    )


def known_loss(name: str) -> str:
    """``name``. Raises ValueError for an unknown loss."""
    known = (AUTO, NONE, *LOSSES, *OF_TARGETS)
    if name not in known:
        raise ValueError(unknown_name("there is no loss", name, known))
    return name


def with_loss(model: nn.Module, name: str, target: Target | None = None) -> nn.Module:
    """``model`` itself, made to return ``{"loss", "output"}``, and to take ``target`` too. Raises ValueError for an
    unknown loss.
    """
    kind, name = type(model), known_loss(name)

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **inputs: Any) -> dict[str, Any]:
        output = kind.forward(self, *args, **inputs)
        given = {**{str(n): value for n, value in enumerate(args)}, **inputs}
        return {"loss": LOSSES[name](output, given), "output": output}

    @wraps(kind.forward)
    def compared(self: nn.Module, *args: Any, **inputs: Any) -> dict[str, Any]:
        assert target is not None
        if target.name in inputs or target.place is None:
            wanted = inputs.pop(target.name)
        else:
            wanted, args = args[target.place], (*args[: target.place], *args[target.place + 1 :])
        output = kind.forward(self, *args, **inputs)
        return {"loss": OF_TARGETS[name](output, wanted), "output": output}

    if target is not None:
        forward = compared
        forward.__signature__ = _with_target(kind.forward, target)  # type: ignore[attr-defined]
    members = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (kind,), members)
    return model


def _with_target(forward: Callable[..., Any], target: Target) -> inspect.Signature:
    """The signature of ``forward`` (with ``self``) that takes the target too."""
    before = list(inspect.signature(forward).parameters.values())
    if target.place is None:
        named = inspect.Parameter(target.name, inspect.Parameter.KEYWORD_ONLY)
        place = next((n for n, entry in enumerate(before) if entry.kind is entry.VAR_KEYWORD), len(before))
        return inspect.Signature([*before[:place], named, *before[place:]])
    place = target.place + 1
    named = inspect.Parameter(target.name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(entry.default is not entry.empty for entry in before[:place]):
        named = named.replace(default=None)  # a parameter behind one with a default needs one
    return inspect.Signature([*before[:place], named, *before[place:]])


def _floating(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_of_tokens(value: Any, logits: Tensor) -> bool:
    return (
        isinstance(value, Tensor) and logits.dim() == 3 and value.shape == logits.shape[:2]
        and value.shape[1] > 1 and not value.is_floating_point() and value.dtype.itemsize > 1
    )  # fmt: skip
