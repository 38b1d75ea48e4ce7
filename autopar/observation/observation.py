"""Watches a model while it is traced: what its forward reads of Python, and what it leaves behind there.

Within the run of forward, ``nn.Module`` and the classes of the user's objects tell of each attribute that is read or
set. When it ends, all is put back: a trace leaves no fake tensors on a model, and a counter stands where it stood.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.ir.guards import Contents, Guards, Reading, Unavailable
from autopar.ir.same_values import MISSING, is_plain, is_same
from autopar.ir.value_guards import ValueGuard
from autopar.observation.asked_of_inputs import attributes_of_tensors
from autopar.observation.changes import Change, put
from autopar.observation.files import files_of_users, question_of_file
from autopar.observation.forbidden import nothing_forbidden
from autopar.observation.gradient_mode import questions_of_modes
from autopar.observation.kept_places import MOST_ITEMS
from autopar.observation.other_state import question_of_variable, variables_of_users
from autopar.observation.owners import attributes, holds_tensor, restore, value_of
from autopar.observation.readings import Readings
from autopar.observation.source_lines import line_of_user
from autopar.observation.tables import HOOKS, SHAPED, Cell, Slots, own_names, reads_all
from autopar.observation.trace_record import (
    Effect,
    Moved,
    TraceRecord,
    add_record,
    is_recording,
    recorded_code,
    recorded_variables,
)
from autopar.observation.what_ran import follow_what_ran, places_of

# torch's own, which no forward of a user's sets
_HIDDEN = ("_flat_weights", "_flat_weight_refs", "_forward_hooks", "_forward_pre_hooks")


ALL = "__dict__"  # in place of the names of all attributes

State = dict[Any, tuple[Any, ...]]


class Observation:
    """Of one model, over one or several runs of its forward.

    Attributes:
        changes: what the latest run left in attributes; undone.
        grown: containers that the latest run changed; undone.
        record: what it met, for other processes.

    ``keeps``: what a run leaves stays until :meth:`undo`. ``records``: which code runs is written down, by a mode of
    torch's, in which its layers do not take their fast paths. ``leaves``: the arguments of the call, flat.
    """

    def __init__(self, model: nn.Module, keeps: bool = False, records: bool = True, leaves: Sequence[Any] = ()) -> None:
        self._model, self._keeps, self._records, self._leaves = model, keeps, records, leaves
        self.readings = Readings(model)
        self.record = TraceRecord()
        self.changes: list[Change] = []
        self.grown: list[Contents] = []
        self._seen: set[tuple[int, str]] = set()
        self._written: dict[tuple[int, str], tuple[bool, str]] = {}
        self._met: defaultdict[int, set[str]] = defaultdict(set)  # the names in both, by owner
        self._writers: dict[tuple[int, str], Any] = {}  # the owners of what was written
        self._variables: list[Reading] = []  # of modules, functions and classes, among the first _looked_at readings
        self._looked_at = 0
        self._tables: list[tuple[dict[str, Any], dict[str, Any], Any]] = []
        self._hooks: list[Contents] = []
        self._patched: list[tuple[type, str, Any]] = []
        self._variables_met, self._files_met = set[str](), set[str]()  # of the environment; read, or looked for
        self._stack = ExitStack()
        self._modules: dict[int, nn.Module] = {}  # by their attributes
        self._depth = 0

    @property
    def guards(self) -> Guards:
        """What has to be as it was, and what forward leaves in attributes."""
        guards = self.readings.settle()
        guards.questions += map(question_of_variable, sorted(self._variables_met))
        guards.questions += map(question_of_file, sorted(self._files_met))
        guards.questions += questions_of_modes(self.record.modes)
        guards.inputs = sorted(self.record.of_inputs)
        if self._files_met:
            self.record.obstacle = f"forward reads the file {min(self._files_met)}"
        self._variables_met.clear()
        self._files_met.clear()
        guards.effects = [
            (one.table, one.key, Unavailable(one.label) if holds_tensor(one.now) else one.now)
            for one in self.changes
            if not one.read_first and (holds_tensor(one.now) or is_plain(one.now))
        ]
        guards.settle()
        return guards

    def report(self, moved: Observation | None) -> None:
        """Tell who collects guards and records of traces; ``moved``: the run that brought the model to rest, if any."""
        follow_what_ran(self.readings, places_of(self.record.code))
        guards = self.guards
        for collected in _COLLECTING:
            collected.extend(guards)
        if is_recording():
            self.record.moved = moved._as_moved() if moved is not None else None
            add_record(self._recorded(guards.effects))

    def _recorded(self, left: Iterable[tuple[dict[str, Any], str, Any]]) -> TraceRecord:
        self.record.asked = list(self.readings.asked)
        self.record.effects = list(self._addressed(left))
        return self.record

    def _as_moved(self) -> Moved:
        kept = [(one.table, one.key, one.now) for one in self.changes if one.read_first]
        record = self._recorded(kept)
        if self.grown:
            record.obstacle = f"forward fills {self.grown[0].label} in its first call"

        @contextmanager
        def undone() -> Iterator[None]:
            self.undo()
            try:
                yield
            finally:
                for change in self.changes:
                    put(change.table, change.key, change.now)

        return Moved(record, record.effects, undone)

    def _addressed(self, left: Iterable[tuple[dict[str, Any], str, Any]]) -> Iterator[Effect]:
        places: dict[int, tuple[str | None, str]] = {}
        for table, _, owner in self._tables:
            shaped = [name for name in SHAPED if isinstance(owner, nn.Module) and attributes(owner)[name] is table]
            places[id(table)] = self.readings.address(owner), shaped[0] if shaped else ""
        for table, key, value in left:
            address, name = places.get(id(table), (None, ""))
            if address is None:
                self.record.obstacle = f"forward sets '{key}' of an object that was not met"
                return
            yield Effect(address, name, key, value)

    @property
    def unstable(self) -> list[Change]:
        """What a call leaves for the next one to read; not where none could have read what was there before."""
        return [one for one in self.changes if one.read_first and type(one.before) is not Unavailable]

    @property
    def is_at_rest(self) -> bool:
        return not self.unstable and not self.grown

    # ------------------------------------------------------------ the run of forward

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context each run of the model's forward is watched."""
        original = nn.Module._call_impl
        held = [(module.__dict__, dict(module.__dict__)) for module in self._model.modules()]
        watching = [self]
        try:
            with mock.patch.object(nn.Module, "_call_impl", _watched(original, watching)):
                yield
        finally:
            watching.clear()  # what is imported meanwhile may keep the function (torch._dynamo.utils does)
            for table, before in held if not self._keeps else ():  # export puts copies in place of lists and dicts
                table.update(before)
        self.readings.hooks_of(self._model)

    def _begin(self, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._seen.clear()
        self._written.clear()
        self._met.clear()
        self._writers.clear()
        self._tables.clear()
        self._hooks.clear()
        self.readings.on_class = self._patch
        self._modules = {id(attributes(module)): module for module in self._model.modules()}
        for module in self._model.modules():
            self._take(module)
            for name in (*SHAPED,):
                self._tables.append((module.__dict__[name], dict(module.__dict__[name]), module))
            for name in HOOKS:
                self._hooks.append(Contents.of(module.__dict__[name], self.readings.label_of_hooks(module, name)))
        self._patch(nn.Module)
        self._stack.enter_context(nothing_forbidden())
        if is_recording() and self._records:
            self._stack.enter_context(recorded_variables(self.record))
        if self._records:
            stood_for = self._stood_for(pytree.tree_leaves((args, kwargs)))
            self._stack.enter_context(recorded_code(self.record, stood_for))
            tensors = (*self._model.parameters(), *self._model.buffers(), *stood_for.values())
            self._stack.enter_context(attributes_of_tensors(self.record.of_inputs, tensors))
        self._stack.enter_context(variables_of_users(self._variables_met)())
        self._stack.enter_context(files_of_users(self._files_met)())
        for owner, _ in list(self.readings.objects.values()):
            self._take(owner)
            self._patch(type(owner))

    def _stood_for(self, given: Sequence[Any]) -> dict[int, Tensor]:
        """The tensors of the call, by the addresses of those that forward is given in their places."""
        pairs = zip(given, self._leaves) if len(given) == len(self._leaves) else ()
        return {id(one): real for one, real in pairs if isinstance(one, Tensor) and isinstance(real, Tensor)}

    def _end(self, problem: BaseException | None = None) -> None:
        """``problem``: what forward raised."""
        self._depth -= 1
        if self._depth:
            return
        try:
            self._stack.__exit__(type(problem), problem, problem.__traceback__) if problem else self._stack.close()
        finally:
            while self._patched:
                cls, name, before = self._patched.pop()
                restore(cls, name, before)
            kept = self.readings.kept
            kept.forget()
            self.changes = [*self._changes(), *kept.changes(self.readings.knows)]
            started = (*self.readings.started, *kept.contents, *self._hooks)
            self.grown = [met for met in started if not met.hold()]
            if not self._keeps:
                self.undo()

    def make_unavailable(self, change: Change) -> None:
        """Put something there that refuses to be read: who writes before it reads does not notice."""
        self.changes[self.changes.index(change)] = told = replace(change, now=Unavailable(change.label))
        put(told.table, told.key, told.now)

    def undo(self) -> None:
        """Put back what the latest run left."""
        for change in self.changes:
            change.undo()
        for met in self.grown:
            met.restore()

    def _take(self, owner: Any) -> None:
        own = getattr(owner, "__dict__", None)
        if isinstance(own, dict):
            self._tables.append((own, dict(own), owner))

    def _changes(self) -> Iterator[Change]:
        for table, before, owner in self._tables:
            for key in {**before, **table}:
                was, now = before.get(key, MISSING), table.get(key, MISSING)
                if is_same(was, now) or key in _HIDDEN or key in SHAPED and isinstance(owner, nn.Module):
                    continue
                read, line = self._written.get((id(owner), key), ((id(owner), key) in self._seen, ""))
                yield Change(self.readings.label(owner, key), table, key, was, now, read, line)
        for one in self.readings.guards.readings:  # globals, and variables of enclosing functions
            is_seen = type(one.table) is Slots
            is_variable = is_seen or type(one.table) is Cell or isinstance(one.table, dict) and "__name__" in one.table
            if is_variable and not one.of_torch and not is_same(one.value, one.now):
                yield Change(one.label, one.table, str(one.key), one.value, one.now, True, "", is_seen)

    # ------------------------------------------------------------ attributes

    def _patch(self, cls: type) -> None:
        """Have ``cls`` tell of the attributes of the objects that were met."""
        if not self._depth or any(known is cls for known, *_ in self._patched):
            return
        for name, made in (("__getattribute__", _reads), ("__setattr__", _writes), ("__delattr__", _writes)):
            before = vars(cls).get(name, MISSING)
            try:
                setattr(cls, name, made(self, getattr(cls, name)))
            except TypeError:  # a class that is written in C
                return
            self._patched.append((cls, name, before))
        for owner, _ in self.readings.objects.values():
            if type(owner) is cls and not any(known is owner for *_, known in self._tables):
                self._take(owner)

    def _itself(self, owner: Any) -> Any:
        """``owner``, or the module for which it stands.

        Where a model has a module under several names, torch hands out stand-ins with the same attributes while it
        traces (``AttrProxy`` of ``torch.fx.experimental.proxy_tensor``).
        """
        is_module = issubclass(type(owner), nn.Module)  # not isinstance, which reads an attribute
        return self._modules.get(id(attributes(owner)), owner) if is_module else owner

    def read(self, owner: Any, name: str) -> None:
        owner = self._itself(owner)
        key = (id(owner), name)
        if key in self._seen or key in self._written or not self.readings.knows(owner):
            return
        if name[:2] == "__" and name not in own_names(owner):  # Python's own
            return
        self._seen.add(key)
        self._met[key[0]].add(name)
        self.readings.attribute(owner, name)

    def read_all(self, owner: Any) -> None:
        """A user's code reads ``vars(owner)``."""
        owner = self._itself(owner)
        if self.readings.knows(owner):
            self._met[id(owner)].add(ALL)
            self.readings.names_of(owner)

    def met(self, owner: Any) -> set[str]:
        """The attributes of ``owner`` that the run of forward has read so far, those that it has set; or ``ALL``."""
        return self._met[id(owner)]

    def state(self) -> State:
        """What the run of forward has changed so far of what Python can read, by place."""
        found: State = {key: (value_of(owner, key[1]),) for key, owner in self._writers.items()}
        for met in self.readings.started:
            if len(met.items) <= MOST_ITEMS and not met.hold():
                found[id(met.container)] = Contents.of(met.container, "").items
        readings = self.readings.guards.readings
        for one in readings[self._looked_at :]:
            if not isinstance(one.table, dict) or "__name__" in one.table:
                self._variables.append(one)
        self._looked_at = len(readings)
        for one in self._variables:
            if one.now is not one.value:
                found[id(one.table), one.key] = (one.now,)
        return found

    def write(self, owner: Any, name: str) -> None:
        owner = self._itself(owner)
        key = (id(owner), name)
        if key not in self._written and self.readings.knows(owner):
            self._written[key] = (key in self._seen, line_of_user(sys._getframe(2)))
            self._writers[key] = owner
            self._met[key[0]].add(name)


def is_same_state(one: State, other: State) -> bool:
    """Whether two results of :meth:`Observation.state` of one run are the same to what reads them."""
    if one.keys() != other.keys():
        return False
    pairs = [(mine, other[place]) for place, mine in one.items()]
    return all(len(mine) == len(its) and all(map(is_same, mine, its)) for mine, its in pairs)


def _reads(observation: Observation, original: Callable[..., Any]) -> Callable[..., Any]:
    def __getattribute__(self: Any, name: str) -> Any:
        observation.read(self, name)
        if reads_all(name, sys._getframe(1).f_code.co_filename):
            observation.read_all(self)
        return original(self, name)

    return __getattribute__


def _writes(observation: Observation, original: Callable[..., None]) -> Callable[..., None]:
    def write(self: Any, name: str, *value: Any) -> None:
        observation.write(self, name)
        original(self, name, *value)

    return write


_COLLECTING: list[Guards] = []


@contextmanager
def guards_of_traces() -> Iterator[Guards]:
    """What the traces within this context have read."""
    guards = Guards()
    _COLLECTING.append(guards)
    try:
        yield guards
    finally:
        _COLLECTING[:] = [one for one in _COLLECTING if one is not guards]  # equal ones may be others'


def add_value_guard(guard: ValueGuard) -> None:
    """Say what the Python of a model has looked at in tensors."""
    for collected in _COLLECTING:
        collected.values.append(guard)


def _watched(original: Callable[..., Any], watching: list[Observation]) -> Callable[..., Any]:
    """Calls of modules; a hook would not be called where forward raises, and then export has put tensors back."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not watching or attributes(module) is not attributes(watching[0]._model):
            return original(module, *args, **kwargs)
        (observation,) = watching
        observation._begin(args, kwargs)
        try:
            found = original(module, *args, **kwargs)
        except BaseException as problem:
            observation._end(problem)
            raise
        observation._end()
        return found

    return call
