"""Whether one module is like another: to Python, so far as it has looked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from inspect import getattr_static
from types import MemberDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.frontend.past_modes import past_modes
from autopar.ir.same_values import is_same
from autopar.observation.code_names import is_users_class
from autopar.observation.observation import ALL
from autopar.observation.tables import HOOKS, SHAPED

Read = Callable[[nn.Module], Set[str]]


@dataclass(frozen=True)
class TensorLook:
    """How a tensor looks to Python."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    needs_gradient: bool
    is_marked: bool  # with attributes of the user's

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLook:
        with past_modes():
            shape, stride, dtype = tuple(tensor.shape), tensor.stride(), tensor.dtype
            is_marked = not own_attributes_of_tensors().issuperset(vars(tensor))
            return cls(shape, stride, dtype, tensor.device, tensor.requires_grad, is_marked)

    @property
    def has_fixed_sizes(self) -> bool:
        return all(type(size) is int for size in (*self.shape, *self.stride))

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def are_alike(traced: nn.Module, block: nn.Module, read: Read) -> bool:
    """Whether all that was read of the module ``traced``, and of those in it, is the same on ``block``."""
    pairs = list(pairs_of(traced, block))
    partner = {id(attributes_of(one)): id(attributes_of(other)) for one, other in pairs}

    def same(one: Any, other: Any) -> bool:
        if is_same(one, other):
            return True
        if type(one) is not type(other):
            return False
        if isinstance(one, nn.Module):
            return partner.get(id(attributes_of(one))) == id(attributes_of(other))
        if type(one) in (list, tuple):
            return len(one) == len(other) and all(map(same, one, other))
        if type(one) is dict:
            return list(one) == list(other) and all(map(same, one.values(), other.values()))
        if type(one) is partial:
            return all(map(same, (one.func, one.args, one.keywords), (other.func, other.args, other.keywords)))
        if hasattr(one, "__func__") and isinstance(one.__self__, nn.Module):  # a bound method
            return one.__func__ is other.__func__ and same(one.__self__, other.__self__)
        return False

    return all(_is_like(one, other, read(one), same) for one, other in pairs if one is not other)


def _is_like(one: nn.Module, other: nn.Module, read: Set[str], same: Callable[[Any, Any], bool]) -> bool:
    """Of two modules alone: what was ``read`` of one is the ``same`` on the other."""
    mine, its = attributes_of(one), attributes_of(other)
    if type(one) is not type(other) or not has_no_hooks(one, other):
        return False
    for name in SHAPED:
        if list(mine[name]) != list(its[name]):
            return False
        if not all(_fits(*pair) for pair in zip(mine[name].values(), its[name].values())):
            return False
    if mine["training"] != its["training"]:
        return False
    names = read - {*SHAPED, *HOOKS}
    if ALL in names:
        names = (names | mine.keys() | its.keys()) - _OF_EVERY_MODULE
    return all(
        same(mine.get(name, _ABSENT), its.get(name, _ABSENT)) and (name in mine or _by_class(one, other, name, same))
        for name in names
    )


def _by_class(one: nn.Module, other: nn.Module, name: str, same: Callable[[Any, Any], bool]) -> bool:
    """Whether what the class of both answers for ``name`` is the same for both, as far as it is not code that is seen.

    A slot holds a value for each; so may a descriptor of the user's, which nobody has looked into.
    """
    found = getattr_static(type(one), name, None)
    if isinstance(found, MemberDescriptorType):
        return same(_slot(one, name), _slot(other, name))
    return not (is_users_class(type(found)) and hasattr(type(found), "__get__"))


def _slot(owner: nn.Module, name: str) -> Any:
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return _ABSENT


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ABSENT = object()


def _fits(one: Any, other: Any) -> bool:
    """Two entries of a module's tables: tensors that look the same, or submodules (which are compared themselves)."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        kinds = isinstance(one, nn.Parameter), isinstance(other, nn.Parameter)
        return kinds[0] == kinds[1] and TensorLook.of(one) == TensorLook.of(other)
    return (one is None) == (other is None)


def pairs_of(one: nn.Module, other: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Both modules and, of those that both have, the submodules under the same names."""
    yield one, other
    its = attributes_of(other).get("_modules", {})
    for name, child in attributes_of(one)["_modules"].items():
        if child is not None and its.get(name) is not None:
            yield from pairs_of(child, its[name])


def has_no_hooks(*modules: nn.Module) -> bool:
    return not any(attributes_of(module)[name] for module in modules for name in HOOKS)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Past what watches the readings of attributes."""
    found: dict[str, Any] = object.__getattribute__(module, "__dict__")
    return found


@functools.cache
def own_attributes_of_tensors() -> frozenset[str]:
    """The attributes that torch's own fake tensors have."""
    return frozenset(vars(FakeTensorMode().from_tensor(torch.empty(()))))
