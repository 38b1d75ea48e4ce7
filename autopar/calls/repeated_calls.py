"""The latest call of a module on one rank: whether the next one is like it is seen at a glance, without a key.

A step of a small model takes half a millisecond, of which sorting the arguments, writing down what they are and finding
that among the programs would be a fortieth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from operator import is_
from typing import Any

import torch
from torch import Tensor

from autopar.autodiff.autograd import is_autocasting
from autopar.calls.calls import Call

_TOLD = frozenset((Tensor, bool, int, str, type(None)))  # constants are compared by identity


class RepeatedCall:
    """Tells calls that are like one, made with ``args`` and ``kwargs``.

    ``required``: which parameters require gradients, now and then. The other state on which a program depends is that
    of torch (:func:`autopar.calls.torch_settings.torch_settings`), and whether the module is ``training``.
    """

    __slots__ = (
        "_deterministic",
        "_dtype",
        "_leaves",
        "_names",
        "_required",
        "_required_then",
        "_training",
        "_unnamed",
    )

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, required: Callable[[], Hashable]
    ) -> None:
        self._unnamed, self._names = len(args), tuple(kwargs)
        self._leaves = [_seen(leaf) for leaf in (*args, *kwargs.values())]
        self._training, self._required, self._required_then = training, required, required()
        self._dtype, self._deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        call: Call,
        training: bool,
        required: Callable[[], Hashable],
    ) -> RepeatedCall | None:
        """None where calls like ``call`` cannot be told: arguments in another order, or no tensors and constants."""
        leaves = [*args, *kwargs.values()]
        in_order = len(leaves) == len(call.leaves) and all(map(is_, leaves, call.leaves))
        told = in_order and not is_autocasting() and _TOLD.issuperset(map(type, leaves))
        return cls(args, kwargs, training, required) if told else None

    def tensors_of(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> list[Tensor] | None:
        """The tensors of a call if it is like this one, as far as arguments and torch's settings tell; else None."""
        if len(args) != self._unnamed or tuple(kwargs) != self._names or training is not self._training:
            return None
        tensors = []
        for leaf, (shape, dtype, needs_gradient) in zip((*args, *kwargs.values()), self._leaves):
            if type(leaf) is Tensor:
                if leaf.dtype is not dtype or leaf.shape != shape or leaf.requires_grad is not needs_gradient:
                    return None
                tensors.append(leaf)
            elif dtype is not None or leaf is not shape:
                return None
        if (
            is_autocasting()
            or torch.get_default_dtype() is not self._dtype
            or torch.are_deterministic_algorithms_enabled() is not self._deterministic
            or self._required() != self._required_then
        ):
            return None
        return tensors


def _seen(leaf: Any) -> tuple[Any, torch.dtype | None, bool]:
    """(shape, dtype, whether it requires a gradient) of a tensor; (value, None, False) of a constant."""
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if type(leaf) is Tensor else (leaf, None, False)
