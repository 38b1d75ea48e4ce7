"""What operators make of tensors of given shapes, strides and dtypes: new storages, and views of what they take.

An operator runs once on tensors without memory for all calls that are alike, so that repeated blocks cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.autodiff.recorder import fake_mode
from autopar.ir.node import Node


class Form(NamedTuple):
    """A tensor but for its memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def contiguous(cls, shape: Sequence[int], dtype: torch.dtype) -> Form:
        strides, step = [0] * len(shape), 1
        for dim in reversed(range(len(shape))):
            strides[dim] = step
            step *= max(1, shape[dim])
        return cls(tuple(shape), tuple(strides), dtype)

    @property
    def is_contiguous(self) -> bool:
        plain = Form.contiguous(self.shape, self.dtype)
        return not self.elements or all(
            size == 1 or here == there for size, here, there in zip(self.shape, self.strides, plain.strides)
        )

    @property
    def elements(self) -> int:
        found = 1
        for size in self.shape:
            found *= size
        return found

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Held:
    """A tensor of ``form`` in the storage with this number."""

    form: Form
    storage: int


class New(NamedTuple):
    """A storage that a call makes: the how manieth, and its bytes."""

    number: int
    bytes: int


@dataclass(frozen=True)
class Made:
    """One result: its form, and the operand whose storage it shares, or the new one."""

    form: Form
    source: int | New


class Operators:
    """The results of operators by what they take, remembered."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._mode = fake_mode()

    def results(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[Held]]:
        """(results of the call as a tree whose leaves are of type :class:`Made`, the tensors that it takes).

        ``args`` and ``kwargs`` have a :class:`Held` for each tensor.
        """
        taken: list[Held] = []
        key = (node.target, _frozen(args, taken), _frozen(kwargs, taken))
        if key not in self._known:
            self._known[key] = self._made(node, args, kwargs, taken)
        return self._known[key], taken

    def _made(self, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], taken: Sequence[Held]) -> Any:
        assert callable(node.target), node.format_node()
        with self._mode, torch.no_grad():
            given = [torch.empty_strided(one.form.shape, one.form.strides, dtype=one.form.dtype) for one in taken]
            waiting = iter(given)
            filled = pytree.tree_map(lambda leaf: next(waiting) if isinstance(leaf, Held) else leaf, (args, kwargs))
            found = node.target(*filled[0], **filled[1])
            storages: dict[int, int | New] = {t.untyped_storage()._cdata: n for n, t in reversed([*enumerate(given)])}
            return pytree.tree_map(lambda leaf: _result(leaf, storages), found)


def _result(leaf: Any, storages: dict[int, int | New]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    storage = leaf.untyped_storage()
    if storage._cdata not in storages:
        number = sum(isinstance(source, New) for source in storages.values())
        storages[storage._cdata] = New(number, storage.nbytes())
    return Made(Form(tuple(leaf.shape), leaf.stride(), leaf.dtype), storages[storage._cdata])


def _frozen(item: Any, taken: list[Held]) -> Any:
    """A hashable key of arguments, which keeps 1, 1.0 and True apart; tensors are added to ``taken``."""
    if isinstance(item, Held):
        taken.append(item)
        return item.form
    if isinstance(item, (list, tuple)):
        return tuple([_frozen(inner, taken) for inner in item])
    if isinstance(item, Mapping):
        return tuple([(key, _frozen(inner, taken)) for key, inner in item.items()])
    return type(item), item
