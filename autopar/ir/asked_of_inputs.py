"""What a model may ask an input beside values, sizes and dtype: how it is stored, whether it is a view, attributes.

A program has one answer. Of a model that asks, the answers of a call are a part of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

STRIDES = "how they are strided"
ATTRIBUTE, ALL = "the attribute ", "of any name"  # and its name


def _strides(tensor: Tensor) -> Hashable:
    """None where they follow from the sizes."""
    if tensor.layout is not torch.strided:
        return str(tensor.layout)
    return None if tensor.is_contiguous() else tensor.stride()


def _offset(tensor: Tensor) -> Hashable:
    return tensor.storage_offset() if tensor.layout is torch.strided else None


ANSWERS: Mapping[str, Callable[[Tensor], Hashable]] = {
    STRIDES: _strides,
    "their storage_offset": _offset,
    "whether they are views": Tensor._is_view,
    "whether they are leaves": lambda tensor: tensor.is_leaf,
    "whether they are shared": Tensor.is_shared,
    "whether they are pinned": Tensor.is_pinned,
    "whether they are of inference mode": Tensor.is_inference,
    "whether they are conjugates": lambda tensor: (tensor.is_conj(), tensor.is_neg()),
}

Answers = tuple[Hashable, ...]


def answers_of(asked: Sequence[str], leaves: Iterable[Any]) -> Answers:
    """Those of the tensors among ``leaves``, in order."""
    return tuple([_answer(name, leaf) for leaf in leaves if isinstance(leaf, Tensor) for name in asked])


def _answer(name: str, tensor: Tensor) -> Hashable:
    ask = ANSWERS.get(name)
    if ask is not None:
        return ask(tensor)
    return tuple(vars(tensor)) if name == ATTRIBUTE + ALL else name.removeprefix(ATTRIBUTE) in vars(tensor)


def unusual_answers(asked: Sequence[str], leaves: Iterable[Any]) -> Answers:
    """As :func:`answers_of`; none where they are those of tensors that were just made, each by itself."""
    found = answers_of(asked, leaves)
    count = len(found) // len(asked) if asked else 0
    return () if found == answers_of(asked, [torch.empty(0)]) * count else found


def told(asked: Iterable[str]) -> str:
    return ", ".join(sorted(asked))
