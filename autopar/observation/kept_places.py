"""Classes and functions, which tell nobody when something is put into them: as they were when forward met them.

A table that forward makes once may be an attribute of a class (``cls._table``, the object of a singleton), of a
function (``fn.table``), or what a function remembers (``functools.lru_cache``). What stands for tensors in a trace
must not stay there.
"""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from autopar.ir.guards import Contents
from autopar.ir.same_values import MISSING, is_plain, is_same
from autopar.observation.changes import Change
from autopar.observation.code_names import is_users, is_users_class
from autopar.observation.tables import OfClass, own_names

CONTAINERS = (list, tuple, dict, set, frozenset, deque)
MOST_ITEMS = 512  # of a container that are compared in each call; a larger one is known by its identity
DEEPEST = 4
_REMEMBERING = type(functools.cache(lambda: None))


class KeptPlaces:
    """What was met, by ``id``.

    Attributes:
        contents: containers in classes, functions, and in the objects that these hold.
    """

    def __init__(self) -> None:
        self.contents = list[Contents]()
        self._met: dict[int, tuple[Any, Any, dict[str, Any], str]] = {}  # owner, its table, what it held, its name
        self._remembering: dict[int, Any] = {}

    def meet(self, value: Any) -> None:
        """``value`` is at hand; whatever is no class, no function, and remembers nothing is left out."""
        self._remembers(value)
        if id(value) in self._met:
            return
        if isinstance(value, type) and is_users_class(value) and not issubclass(value, Tensor):
            self._take(value, OfClass(value), value.__name__)
        elif type(value) is FunctionType and is_users(value.__module__):
            self._take(value, vars(value), value.__name__)

    def _remembers(self, value: Any) -> None:
        value = getattr(value, "__func__", value) if isinstance(value, (staticmethod, classmethod)) else value
        if type(value) is _REMEMBERING:
            self._remembering[id(value)] = value

    def _take(self, owner: Any, table: Any, label: str, depth: int = 0) -> None:
        own = table.names() if isinstance(table, OfClass) else dict(table)
        self._met[id(owner)] = owner, table, own, label
        for name, value in own.items():
            self._look_into(value, f"{label}.{name}", depth)

    def _look_into(self, value: Any, label: str, depth: int) -> None:
        """Objects and containers that a class or a function holds may be filled too."""
        self._remembers(value)
        if is_plain(value) or depth == DEEPEST or id(value) in self._met:
            return
        if isinstance(value, CONTAINERS) and len(value) <= MOST_ITEMS:
            met = Contents.of(value, label)
            self._met[id(value)] = value, {}, {}, label
            self.contents.append(met)
            for item in met.items:
                self._look_into(item, label, depth + 1)
        elif not isinstance(value, (type, Tensor, nn.Module, FunctionType)) and is_users_class(type(value)):
            self._take(value, own_names(value), label, depth + 1)

    def changes(self, knows: Callable[[Any], bool]) -> Iterator[Change]:
        """What a run has left, but for what it left in owners that somebody ``knows`` better."""
        for owner, table, before, label in self._met.values():
            for key, was, now in _apart(table, before) if not knows(owner) else ():
                yield Change(f"{label}.{key}", table, key, was, now, True, "", is_seen=False)

    def forget(self) -> None:
        """Have functions forget what they remember, where it holds what stands for a tensor in a trace."""
        for function in self._remembering.values():
            referred = gc.get_referents(function)
            entries = [entry for table in referred if type(table) is dict for entry in table.values()]
            if any(isinstance(leaf, STAND_INS) for leaf in pytree.tree_leaves([*referred, *entries])):
                function.cache_clear()


STAND_INS = (FakeTensor, FunctionalTensor)


def _apart(table: Any, before: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    now = table.names() if isinstance(table, OfClass) else table
    for key in [*before, *(key for key in now if key not in before)]:
        pair = before.get(key, MISSING), now.get(key, MISSING)
        if pair[0] is not pair[1] and not is_same(*pair):
            yield key, *pair
