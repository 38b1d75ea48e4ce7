"""What a program assumes of the Python state that its model reads, compared before each call.

A trace bakes in whatever forward reads beside its tensors: attributes, globals, the module tree. Each reading becomes
one line of a flat table, (namespace, name, value), and a call compares them by identity: some 20 ns each. Where an
object is another one, the slow way tells a new value from an equal one.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor

from autopar.errors import AutoparError
from autopar.ir.names_hold import are_told_apart, names_hold
from autopar.ir.same_values import MISSING, is_same, shown
from autopar.ir.value_guards import ValueGuard

Thing = TypeVar("Thing")
FREQUENT = 4  # calls after which it pays to write the comparisons out, 10 us for each
PARTS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")  # of a function
WRITTEN_OUT = 1000  # readings, of which more take longer to compile than any call is sooner
Container = list[Any] | tuple[Any, ...] | dict[Any, Any] | set[Any] | frozenset[Any] | deque[Any]


class Unavailable:
    """In place of a tensor that forward leaves in an attribute: a program does not, and any use of this says so."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __repr__(self) -> str:
        return f"<{self._label}, which forward sets and a parallel program does not>"

    def __deepcopy__(self, memo: Any) -> Unavailable:
        return self

    def __reduce__(self) -> Any:
        return Unavailable, (self._label,)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise AutoparError(
            f"forward sets the attribute '{self._label}' to a tensor, which a parallel program does not\n"
            "Way out: return the tensor from forward and use it from there."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):  # somebody asks what kind of object this is
            raise AttributeError(name)
        return self._refuse()

    __torch_function__ = __bool__ = __float__ = __int__ = __len__ = __iter__ = __getitem__ = __neg__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __matmul__ = __rmatmul__ = _refuse


@dataclass(frozen=True)
class Reading:
    """``table[key]`` was ``value``; ``label`` is its name for a user, such as ``layers.0.dropout.p``.

    ``by_type``: the value is a parameter or buffer, which a program takes as it is then; any of its type will do.
    ``of_torch``: it is one of torch's functions, in whose places others stand while a model is traced.
    """

    table: Any
    key: Hashable
    value: Any
    label: str
    by_type: bool = False
    of_torch: bool = False

    @property
    def now(self) -> Any:
        return _get(self.table, self.key)

    def holds_with(self, now: Any) -> bool:
        if self.by_type and isinstance(self.value, Tensor) and isinstance(now, Tensor):
            has_device_now = self.value.is_meta and not now.is_meta  # the model was built without data, and has it now
            return _kind(self.value) == _kind(now) and (has_device_now or self.value.device == now.device)
        return is_same(self.value, now)


@dataclass(frozen=True)
class Contents:
    """What a container held: its items; of a dict its keys, then its values."""

    container: Container
    items: tuple[Any, ...]
    label: str

    @classmethod
    def of(cls, container: Container, label: str) -> Contents:
        return cls(container, _items(container), label)

    def hold(self) -> bool:
        now = _items(self.container)
        if len(now) != len(self.items):
            return False
        return all(map(operator.is_, self.items, now)) or all(map(is_same, self.items, now))

    def restore(self) -> None:
        """Put the items back; an immutable container cannot have changed."""
        container = self.container
        if isinstance(container, (list, deque)):
            container.clear()
            container.extend(self.items)
        elif isinstance(container, dict):
            container.clear()
            half = len(self.items) // 2
            container.update(zip(self.items[:half], self.items[half:]))
        elif isinstance(container, set):
            container.clear()
            container.update(self.items)


@dataclass(frozen=True)
class Question:
    """What ``ask`` gave: of state that is no entry of a table, such as a context variable or the data of an array."""

    ask: Callable[[], Any]
    answer: Any
    label: str

    def hold(self) -> bool:
        return is_same(self.answer, self.ask())


@dataclass
class Guards:
    """The readings of one trace.

    Attributes:
        readings: names that had a value.
        absent: (namespace, name, label) of names that had none.
        quiet: dicts that were empty (hooks).
        contents: containers that were read.
        written: tensors in containers, with the number of times that each was written into.
        effects: (namespace, name, value) of plain values that forward leaves in attributes.
        values: what Python has seen in tensors.
        questions: what is asked in each call.
        owners: modules and objects that were met, whose classes are compared.
        functions: (function, its :data:`parts <PARTS>`) of those that may be edited while the process runs.
        inputs: what is asked of the inputs of each call, see :mod:`autopar.ir.asked_of_inputs`.
    """

    readings: list[Reading] = field(default_factory=list)
    absent: list[tuple[Mapping[Any, Any], Hashable, str]] = field(default_factory=list)
    quiet: list[tuple[Mapping[Any, Any], str]] = field(default_factory=list)
    contents: list[Contents] = field(default_factory=list)
    written: list[tuple[Tensor, int, str]] = field(default_factory=list)
    effects: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    values: list[ValueGuard] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    owners: list[Any] = field(default_factory=list)
    functions: list[tuple[FunctionType, tuple[Any, ...]]] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Take tensors, and what is torch's, as they are now: while a model is traced, others stand in their places."""
        self.readings = [_now(one) if isinstance(one.value, Tensor) or one.of_torch else one for one in self.readings]
        self._classes = [type(owner) for owner in self.owners]
        baked = [one for one in self.readings if isinstance(one.value, Tensor) and not one.by_type]
        self._versions = [*self.written, *((one.value, version_of(one.value), one.label) for one in baked)]
        self._present = tuple((one.table, one.key, one.value) for one in self.readings)
        self._absent = tuple((table, key) for table, key, _ in self.absent)
        self._quiet = tuple(table for table, _ in self.quiet)
        self._calls = 0
        self._written_out: Callable[[], bool] | None = None
        self._asked: Sequence[Contents] = ()  # those that are not written out

    def extend(self, other: Guards) -> None:
        """Hold what ``other`` holds too."""
        for name in (one.name for one in fields(self)):
            getattr(self, name).extend(getattr(other, name))
        self.settle()

    @classmethod
    def joined(cls, several: Sequence[Guards]) -> Guards:
        """What all of ``several`` assume, each thing once; the effects are the first one's."""
        return cls(
            _once([one for guards in several for one in guards.readings], lambda one: (id(one.table), one.key)),
            _once([one for guards in several for one in guards.absent], lambda one: (id(one[0]), one[1])),
            _once([one for guards in several for one in guards.quiet], lambda one: id(one[0])),
            _once([one for guards in several for one in guards.contents], lambda one: id(one.container)),
            _once([one for guards in several for one in guards.written], lambda one: id(one[0])),
            list(several[0].effects),
            [one for guards in several for one in guards.values],
            [one for guards in several for one in guards.questions],
            _once([one for guards in several for one in guards.owners], id),
            _once([one for guards in several for one in guards.functions], lambda one: id(one[0])),
            _once([one for guards in several for one in guards.inputs], str),
        )

    @property
    def ask_for_gradients(self) -> bool:
        """Whether forward asks if gradients are enabled where it is called."""
        return any(question.ask is torch.is_grad_enabled for question in self.questions)

    def leaves_alike(self, other: Guards) -> bool:
        """Whether forward leaves the same values in the same attributes."""
        mine, others = ({(id(table), key): value for table, key, value in each.effects} for each in (self, other))
        return mine.keys() == others.keys() and all(is_same(mine[place], others[place]) for place in mine)

    def hold(self) -> bool:
        """Whether all is as it was."""
        self._calls += 1
        if self._calls == FREQUENT and len(self._present) <= WRITTEN_OUT:
            alike = [one for one in self.contents if are_told_apart(one.items)]
            self._asked = [one for one in self.contents if not are_told_apart(one.items)]
            self._written_out = names_hold(
                self._present,
                self._absent,
                self._quiet,
                list(zip(self.owners, self._classes)),
                [(one.container, one.items) for one in alike],
                self.functions,
            )
        try:
            if self._written_out is not None and self._written_out():
                return self._answers_hold(self._asked)
            for table, key, value in self._present:
                if table[key] is not value:
                    return self._hold_by_value()
        except (KeyError, AttributeError, ValueError):  # of a slot or a variable that is empty now
            return False
        return self._nothing_new() and self._rest_holds()

    def _nothing_new(self) -> bool:
        """Whether there is nothing where there was nothing."""
        for table, key in self._absent:
            if key in table:
                return False
        return not any(self._quiet)

    def _rest_holds(self) -> bool:
        if [*map(type, self.owners)] != self._classes or not all(map(_is_unedited, self.functions)):
            return False
        return self._answers_hold(self.contents)

    def _answers_hold(self, containers: Sequence[Contents]) -> bool:
        for contents in containers:
            if not contents.hold():
                return False
        for question in self.questions:
            if not question.hold():
                return False
        return not self._versions or all(version_of(tensor) == version for tensor, version, _ in self._versions)

    def _hold_by_value(self) -> bool:
        """As :meth:`hold`, where some object is another one; equal ones are remembered instead."""
        found = [one.now for one in self.readings]
        if not all(one.holds_with(now) for one, now in zip(self.readings, found)) or self._ties() != self._ties(found):
            return False
        self.readings = [replace(one, value=now) for one, now in zip(self.readings, found)]
        self._present = tuple((one.table, one.key, one.value) for one in self.readings)
        self._calls, self._written_out = FREQUENT, None  # not written out again: this may come often
        return self._nothing_new() and self._rest_holds()

    def _ties(self, values: Sequence[Any] | None = None) -> list[int]:
        """Which parameters and buffers are one tensor: of each, the place of the first that it is. ``values``: now."""
        values = [one.value for one in self.readings] if values is None else values
        first: dict[int, int] = {}
        pairs = zip(self.readings, values)
        return [first.setdefault(id(value), place) for place, (one, value) in enumerate(pairs) if one.by_type]

    def replay(self) -> None:
        """Leave in attributes what forward would leave there."""
        for table, key, value in self.effects:
            table[key] = value

    def change(self) -> str:
        """What has changed, in words; empty where all holds."""
        return next(self._changes(), "")

    def _changes(self) -> Iterator[str]:
        for one in self.readings:
            now = one.now
            if not one.holds_with(now):
                yield f"{one.label} was {' and is '.join(_apart(one.value, now))}"
        if self._ties() != self._ties([one.now for one in self.readings]):
            yield "which parameters are one tensor has changed"
        for table, key, label in self.absent:
            if key in table:
                yield f"{label} was {MISSING} and is {shown(table[key])}"
        for hooks, label in self.quiet:
            if hooks:
                yield f"{label} was registered"
        for contents in self.contents:
            if not contents.hold():
                yield f"what {contents.label} holds has changed"
        for question in self.questions:
            if not question.hold():
                yield f"{question.label} has changed"
        for owner, cls in zip(self.owners, self._classes):
            if type(owner) is not cls:
                yield f"a {cls.__name__} is a {type(owner).__name__} now"
        for tensor, version, label in self._versions:
            if version_of(tensor) != version:
                yield f"the tensor {label} was written into"
        for edited in self.functions:
            if not _is_unedited(edited):
                yield f"the code of {edited[0].__qualname__} has changed"


def _is_unedited(one: tuple[FunctionType, tuple[Any, ...]]) -> bool:
    """Tools that load edited files anew (IPython's ``%autoreload``) put new code into the functions that there are."""
    now = PARTS(one[0])
    return all(map(operator.is_, one[1], now))


def _once(things: Sequence[Thing], key: Callable[[Thing], Hashable]) -> list[Thing]:
    """The first of those with one key."""
    found: dict[Hashable, Thing] = {}
    for thing in things:
        found.setdefault(key(thing), thing)
    return list(found.values())


def _apart(was: Any, now: Any) -> list[str]:
    """Both in words, which differ."""
    both = [shown(was), shown(now)]
    if both[0] == both[1] and isinstance(was, Tensor) and isinstance(now, Tensor):
        both = [f"{shown(t)} ({t.dtype}, {t.device}{', requires_grad' * t.requires_grad})" for t in (was, now)]
    return both


def _get(table: Any, key: Hashable) -> Any:
    try:
        return table[key]
    except (KeyError, AttributeError, ValueError):
        return MISSING


def _now(one: Reading) -> Reading:
    now = one.now
    return one if now is one.value else replace(one, value=now)


def _items(container: Container) -> tuple[Any, ...]:
    return (*container, *container.values()) if isinstance(container, dict) else tuple(container)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.shape, tensor.dtype, tensor.requires_grad


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written into; 0 for those of ``inference_mode``, which do not count."""
    return 0 if tensor.is_inference() else tensor._version
