"""What Python in a model has looked at in tensors (``if mask.any()``, ``int(lengths.max())``), and what it saw.

A program has taken the branch, or the size, of one batch. It serves those batches on which the same is seen: that is
computed before each call, from whole inputs and buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.ir.same_values import is_same, shown

MOST_OUTCOMES = 16  # programs of one kind of call that differ by what was seen
SIZE = "size"


@dataclass(frozen=True)
class Look:
    """A place where a value was looked at: ``seen``, as ``kind``: bool, int, float, item, tolist, size."""

    kind: str
    seen: Any
    line: str


@dataclass(frozen=True)
class ValueGuard:
    """A graph that computes the tensors of ``looks`` from ``sources``: a flat position in the call, or (table, key)."""

    graph: fx.GraphModule
    sources: tuple[int | tuple[Any, str], ...]
    looks: tuple[Look, ...]

    def hold(self, leaves: Sequence[Any]) -> bool:
        """Whether a call with these arguments (flat) shows the same."""
        return not self.change(leaves)

    def change(self, leaves: Sequence[Any]) -> str:
        """The first place where something else is seen, in words; empty if there is none."""
        inputs = [leaves[one] if isinstance(one, int) else one[0][one[1]] for one in self.sources]
        with torch.no_grad():
            found = self.graph(*inputs)
        for look, tensor in zip(self.looks, found):
            now = READ[look.kind](tensor)
            if not is_same(look.seen, now) and look.seen != now:
                return f"at {look.line}\n  {shown(look.seen)} was seen, and now {shown(now)}"
        return ""


READ: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "item": Tensor.item,
    "tolist": Tensor.tolist,
    SIZE: int,
}


def guard_of(graph: fx.Graph, sources: Sequence[int | tuple[Any, str]], looks: Sequence[Look]) -> ValueGuard:
    """``graph`` returns a tuple of tensors, one for each of ``looks``, and takes one for each of ``sources``."""
    return ValueGuard(fx.GraphModule(nn.Module(), graph), tuple(sources), tuple(looks))
