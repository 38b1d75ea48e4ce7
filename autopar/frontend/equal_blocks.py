"""Blocks of a model that would be traced alike: two calls of a kind are traced, the others become one operator each.

    h1 = block.0(h0)                          h1 = block.0(h0)
    h2 = block.1(h1)             -->          h2 = block.1(h1)
    h3 = block.2(h2)                          h3 = block_again(h2, parameters of block.2, like block.1)

:mod:`autopar.frontend.block_copies` then writes the calls of block 1 in place of each such operator, if the calls of
blocks 0 and 1 came out equal. A block is like another when all that its Python has read of the other, by the
observation of the trace, has the same value on itself, its arguments look the same, and nothing that forward has
changed elsewhere (an attribute of a config, a global, an item of a list) has changed since. A block whose call changes
such a thing is traced, and so is each like it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from autopar.frontend.alike import (
    TensorLook,
    are_alike,
    attributes_of,
    has_no_hooks,
    own_attributes_of_tensors,
    pairs_of,
)
from autopar.frontend.past_modes import function_modes
from autopar.ir.same_values import PLAIN
from autopar.observation.observation import ALL, State, is_same_state
from autopar.operators.registry import library

FEWEST = 4  # modules of a class under one parent: of fewer, nothing would be saved
TRACED = 2  # calls of a kind, that are compared

_LIBRARY = library(
    "block_begins(Tensor[] taken, int number) -> ()",
    "block_ends(Tensor[] given, int number) -> ()",
    "block_again(Tensor[] taken, int number, int like) -> Tensor[]",
)
BEGINS = torch.ops.autopar.block_begins.default
ENDS = torch.ops.autopar.block_ends.default
AGAIN = torch.ops.autopar.block_again.default
_NUMBERS = itertools.count()  # never twice in a process: torch remembers what operators gave for the same arguments

Read = Callable[[nn.Module], Set[str]]


class Seen(Protocol):
    """What an :class:`autopar.observation.observation.Observation` tells."""

    def met(self, owner: Any) -> set[str]: ...

    def read_all(self, owner: Any) -> None: ...

    def state(self) -> State: ...


@dataclass
class Stamps:
    """Of one trace: whether blocks may be left untraced, and how many were."""

    are_allowed: bool = True
    made: int = 0


_STAMPS: ContextVar[Stamps] = ContextVar("stamps")


@contextmanager
def stamps(*, are_allowed: bool = True) -> Iterator[Stamps]:
    """Counts the blocks that traces within this context leave untraced."""
    found = Stamps(are_allowed)
    token = _STAMPS.set(found)
    try:
        yield found
    finally:
        _STAMPS.reset(token)


class BlocksDiffer(Exception):
    """Calls of blocks that were taken for equal are not: the model has to be traced without."""


@dataclass
class _Call:
    """A call of a block that was traced. ``given``: of each result its look, or the position of what is passed on."""

    number: int
    module: nn.Module
    given: tuple[Any, ...]
    spec: pytree.TreeSpec
    state: State  # in which it was called
    is_usable: bool


@dataclass
class _Kind:
    """Calls with equal arguments of blocks that are alike."""

    calls: list[_Call] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether the next call need not be traced."""
        latest = self.calls[-TRACED:]
        if len(latest) < TRACED or not all(call.is_usable for call in latest):
            return False
        return all((call.given, call.spec) == (latest[0].given, latest[0].spec) for call in latest)


class EqualBlocks:
    """Of one trace of ``model``; ``seen`` tells what its forward has read and changed so far.

    ``marked``: the number of calls of blocks that the graph has between operators of ours; ``stamped``: of those that
    were not traced.
    """

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        self.marked = self.stamped = 0
        self._seen, self._stamps = seen, _STAMPS.get(Stamps())
        own_attributes_of_tensors()  # before there are modes in which it would be part of the graph
        blocks = blocks_of(model) if self._stamps.are_allowed else ()
        self._blocks = {id(attributes_of(block)): block for block in blocks}
        self._kinds: dict[Any, list[_Kind]] = {}
        self._is_inside = False  # of a block that is being traced

    @contextmanager
    def known(self) -> Iterator[None]:
        """Within this context, the operators that stand for blocks can be run on fake tensors."""
        try:
            yield
        finally:
            _LOOKS.clear()

    @contextmanager
    def stamping(self) -> Iterator[None]:
        """Within this context, the calls of blocks that are like others are not traced."""
        original: Callable[..., Any] = nn.Module._call_impl
        surroundings = _surroundings()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            block = self._blocks.get(id(attributes_of(module)))
            if block is None or self._is_inside or not torch.compiler.is_exporting():  # type: ignore[no-untyped-call]
                return original(module, *args, **kwargs)
            if _surroundings() != surroundings:  # export makes graphs of their own of what runs there
                return original(module, *args, **kwargs)
            return self._called(block, args, kwargs, lambda: original(module, *args, **kwargs))

        with mock.patch.object(nn.Module, "_call_impl", call) if self._blocks else nullcontext():
            yield

    def _called(self, block: nn.Module, args: Any, kwargs: Any, trace: Callable[[], Any]) -> Any:
        if not (is_simple((args, kwargs)) and has_no_hooks(block)):
            return trace()
        leaves, spec = pytree.tree_flatten((args, kwargs))
        taken = [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *_tensors_of(block)]
        looks = tuple(TensorLook.of(leaf) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf)) for leaf in leaves)
        key = (type(block), str(spec), looks, _equal_ones(taken), function_modes())
        if not all(look.has_fixed_sizes and not look.is_marked for look in looks if isinstance(look, TensorLook)):
            return trace()
        state = self._seen.state()
        kinds = self._kinds.setdefault(key, [])
        for kind in kinds:
            if not is_same_state(kind.calls[-1].state, state):
                continue
            if not are_alike(kind.calls[-1].module, block, self._seen.met):
                continue
            if kind.is_settled:
                return self._again(kind.calls[-1], block, taken, leaves)
            break
        else:
            kind = _Kind()
            kinds.append(kind)
        result, made = self._traced(block, taken, (args, kwargs), state, trace)
        kind.calls.append(made)
        return result

    def _traced(
        self, block: nn.Module, taken: Sequence[Tensor], call: Any, state: State, trace: Callable[[], Any]
    ) -> tuple[Any, _Call]:
        leaves, looks = pytree.tree_leaves(call), [TensorLook.of(tensor) for tensor in taken]
        number, self._is_inside, self.marked = next(_NUMBERS), True, self.marked + 1
        torch.ops.autopar.block_begins(taken, number)
        try:
            result = trace()
        finally:
            self._is_inside = False
        after = [*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *_tensors_of(block)]
        is_usable = is_simple(result) and list(map(id, pytree.tree_leaves(call))) == list(map(id, leaves))
        is_usable = is_usable and list(map(id, after)) == list(map(id, taken))
        is_usable = is_usable and looks == [TensorLook.of(tensor) for tensor in after]
        is_usable = is_usable and is_same_state(state, self._seen.state())
        results, spec = pytree.tree_flatten(result)
        positions = {id(leaf): position for position, leaf in reversed(list(enumerate(leaves)))}
        given = tuple(
            positions.get(id(item), TensorLook.of(item)) if isinstance(item, Tensor) else (item,) for item in results
        )
        made = [item for item, entry in zip(results, given) if isinstance(entry, TensorLook)]
        torch.ops.autopar.block_ends(made, number)
        looks = [entry for entry in given if isinstance(entry, TensorLook)]
        is_usable = is_usable and all(look.has_fixed_sizes and not look.is_marked for look in looks)
        return result, _Call(number, block, given, spec, state, is_usable)

    def _again(self, like: _Call, block: nn.Module, taken: list[Tensor], leaves: Sequence[Any]) -> Any:
        """The results of ``block``, by the operator that stands for it."""
        number, self.stamped = next(_NUMBERS), self.stamped + 1
        self._stamps.made += 1
        _LOOKS[number] = [entry for entry in like.given if isinstance(entry, TensorLook)]
        made = iter(torch.ops.autopar.block_again(taken, number, like.number))
        results: list[Any] = []
        for entry in like.given:
            if isinstance(entry, TensorLook):
                results.append(next(made))
                if TensorLook.of(results[-1]) != entry:
                    raise BlocksDiffer(f"{TensorLook.of(results[-1])} in place of {entry}")
            else:
                results.append(leaves[entry] if isinstance(entry, int) else entry[0])
        read_alike(self._seen, like.module, block)
        return pytree.tree_unflatten(results, like.spec)


def read_alike(seen: Seen, ran: nn.Module, block: nn.Module) -> None:
    """Have the observation note for ``block`` what forward has read of the one that ``ran``."""
    for one, other in pairs_of(ran, block):
        for name in sorted(seen.met(one)):
            if name == ALL:
                seen.read_all(other)
            else:
                getattr(other, name, None)


_LOOKS: dict[int, list[TensorLook]] = {}  # what block_again gives, by its number, while a model is traced


def looks_like(number: int, other: int) -> None:
    """Let the operator for the block ``number`` give what that for the ``other`` one does."""
    _LOOKS[number] = _LOOKS[other]


def _given(taken: Sequence[Tensor], number: int, like: int) -> list[Tensor]:
    return [look.made() for look in _LOOKS[number]]


torch.library.register_fake("autopar::block_again", _given, lib=_LIBRARY)
for _name in ("block_begins", "block_ends"):
    torch.library.register_fake(f"autopar::{_name}", lambda tensors, number: None, lib=_LIBRARY)
for _marker in (BEGINS, ENDS):  # torch leaves out calls without results, as it decomposes a graph
    fx.node.has_side_effect(_marker)


# ---------------------------------------------------------------- which modules


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules with submodules of which at least ``FEWEST`` of one class stand under one parent; outermost ones."""
    found: list[nn.Module] = []
    waiting = [model]
    while waiting:
        children = {id(child): child for child in waiting.pop()._modules.values() if child is not None}.values()
        counts: dict[type, int] = {}
        for child in children:
            counts[type(child)] = counts.get(type(child), 0) + 1
        for child in children:
            is_block = counts[type(child)] >= FEWEST and bool(child._modules)
            (found if is_block else waiting).append(child)
    return found


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers in the order of their tables, those with several names several times."""
    own = attributes_of(module)
    yield from (tensor for name in ("_parameters", "_buffers") for tensor in own[name].values() if tensor is not None)
    for child in own["_modules"].values():
        if child is not None:
            yield from _tensors_of(child)


# ---------------------------------------------------------------- calls


def is_simple(item: Any) -> bool:
    """Whether it is made of tensors and plain values in plain containers, so that nothing can be left in it unseen."""
    if type(item) in (tuple, list):
        return all(map(is_simple, item))
    if type(item) is dict:
        return all(map(is_simple, item.values()))
    return isinstance(item, (Tensor, *PLAIN))


def _equal_ones(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """For each tensor the first place at which it stands."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(tensor), position) for position, tensor in enumerate(tensors))


def _surroundings() -> tuple[Any, ...]:
    """What torch's own state adds to a call."""
    devices = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in devices]
    return (torch.is_grad_enabled(), tuple(autocast), torch.get_default_dtype())
