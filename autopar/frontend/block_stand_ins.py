"""Blocks that are alike, run once where only sizes count: other calls give tensors without data of the same sizes.

The sizes may be symbols (``SymInt``). For a run whose results nobody takes: see :mod:`autopar.frontend.size_questions`;
for traces there is :mod:`autopar.frontend.equal_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.frontend.alike import are_alike, attributes_of, has_no_hooks
from autopar.frontend.equal_blocks import Seen, blocks_of, is_simple, read_alike
from autopar.observation.observation import State, is_same_state


@dataclass(frozen=True)
class _Call:
    """One call that was run: the block, what it gave, and what forward had changed before it."""

    block: nn.Module
    result: Any
    state: State


@contextmanager
def alike_blocks_run_once(model: nn.Module, seen: Seen) -> Iterator[None]:
    """Within this context, a block of ``model`` that is like one that has run is not run.

    ``seen`` tells what forward has read and changed. What a block gives is new: where it hands on an argument, that
    is a tensor of the same sizes.
    """
    blocks = {id(attributes_of(block)) for block in blocks_of(model)}
    calls: dict[Any, list[_Call]] = {}
    original: Callable[..., Any] = nn.Module._call_impl
    inside = [False]

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (
            id(attributes_of(module)) not in blocks
            or inside[0]
            or not (is_simple((args, kwargs)) and has_no_hooks(module))
        ):
            return original(module, *args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        key = type(module), str(spec), tuple(map(_look, leaves))
        state = seen.state()
        for known in calls.get(key, ()):
            if is_same_state(known.state, state) and are_alike(known.block, module, seen.met):
                read_alike(seen, known.block, module)
                return pytree.tree_map_only(Tensor, torch.empty_like, known.result)
        inside[0] = True
        try:
            result = original(module, *args, **kwargs)
        finally:
            inside[0] = False
        if is_simple(result) and is_same_state(state, seen.state()):
            calls.setdefault(key, []).append(_Call(module, result, state))
        return result

    with mock.patch.object(nn.Module, "_call_impl", call):
        yield


def _look(leaf: Any) -> Any:
    """What Python sees of an argument, with sizes as texts."""
    if not isinstance(leaf, Tensor):
        return type(leaf), repr(leaf)
    return str(tuple(leaf.shape)), str(leaf.stride()), leaf.dtype, leaf.requires_grad
