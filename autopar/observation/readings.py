"""Collects what a model reads while it runs, object by object, into :class:`autopar.ir.guards.Guards`.

What a value is decides what is looked at next: of a container its items, of a function the names in its code, of an
object of the user's (a config) the attributes that are read of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import getmro
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any
from weakref import ReferenceType

from torch import Tensor, nn

from autopar.ir.guards import PARTS, Contents, Guards, Reading, version_of
from autopar.ir.same_values import PLAIN, is_plain
from autopar.observation.code_names import functions_of, imported_by, is_users, is_users_class, names_of
from autopar.observation.kept_places import CONTAINERS, MOST_ITEMS, KeptPlaces
from autopar.observation.other_state import HOLDERS, question_of, question_of_names, state_of
from autopar.observation.spaces import OF_TORCH, Space, Spaces, attributes_named, space_of, up_to_users
from autopar.observation.tables import A_HOOK, HOOKS, OWN, SHAPED, Cell, Slots, is_empty, own_names, superclasses_of

_PLAIN = frozenset(PLAIN)


class Readings:
    """The readings of one trace of ``model``.

    Attributes:
        guards: what was read so far.
        objects: the user's objects that were met, by ``id``, with a label; modules are known by their paths.
        started: containers as they were when they were met.
        generators: (label, function that gives its state, that state) of random number generators that were met.
        asked: (owner, attribute) of all readings of attributes in their order, see :meth:`repeat`.
        spaces, kept: modules and classes that were met; classes and functions as they were then.
        is_over: the run has ended: of what is met from now on all counts that a function names which `may_have_run`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.guards, self.started = Guards(), list[Contents]()
        self.objects: dict[int, tuple[Any, str]] = {}
        self.generators: list[tuple[str, Callable[[], Any], str]] = []
        self.asked: list[tuple[str, str]] = []
        self.is_over, self._late = False, list[nn.Module]()
        self.on_class: Callable[[type], None] = lambda cls: None
        self.may_have_run: Callable[[FunctionType], bool] = lambda function: True
        self._paths, self._owners = dict[int, str](), dict[str, Any]()  # the latter by what address() says
        self._addresses, self._modules = dict[int, str](), dict[int, bool]()  # of owners, which live as long as this
        for path, module in model.named_modules():
            self._paths[id(module)] = path
            self._settle_at(module, path)
        self._root, self._classes = model, dict[type, Mapping[str, Any]]()  # the root has hooks of ours
        self._known, self._alive = set[tuple[int, Any]](), list[Any]()  # the latter so that no id is used twice
        self._waiting, self._importing = deque[FunctionType](), list[FunctionType]()  # the first waiting is followed
        self.spaces, self.kept = Spaces(self._named), KeptPlaces()

    def label(self, owner: Any, name: str) -> str:
        """``layers.0.dropout.p``."""
        if id(owner) in self.objects:
            return f"{self.objects[id(owner)][1]}.{name}"
        path = self._paths.get(id(owner), type(owner).__name__)
        return f"{path}.{name}" if path else name

    def label_of_hooks(self, owner: nn.Module, name: str) -> str:
        """``a hook of layers.0 (forward_hooks)``."""
        return f"{A_HOOK} {self._paths.get(id(owner), '') or 'the model'} ({name.strip('_')})"

    def knows(self, owner: Any) -> bool:
        """Whether ``owner`` is a module of the model, or an object that it reads."""
        return id(owner) in self._paths or id(owner) in self.objects

    # ------------------------------------------------------------ addresses

    def address(self, owner: Any) -> str | None:
        """What finds ``owner``, a module or an object that was met, in the readings of another process too."""
        return self._addresses.get(id(owner))

    def address_of_watched(self) -> Callable[[Any], str | None]:
        """:meth:`address` of modules and of the objects that were met so far, of which the trace saw what was read.

        What a function reads of others that it leads to afterwards, nobody has seen.
        """
        watched = self._paths.keys() | self.objects.keys()
        return lambda owner: self._addresses.get(id(owner)) if id(owner) in watched else None

    def owner_at(self, address: str) -> Any:
        """What :meth:`address` said this of; None for what was not met."""
        return self._owners.get(address)

    def _settle_at(self, owner: Any, label: str) -> None:
        address, number = label, 1
        while address in self._owners:
            number += 1
            address = f"{label} ({number})"
        self._owners[address] = owner
        self._addresses[id(owner)] = address
        self.guards.owners.append(owner)

    def repeat(self, asked: Iterable[tuple[str, str]]) -> str | None:
        """Read the attributes that another trace :attr:`asked` for; the address of the first owner that is missing."""
        for address, name in asked:
            owner = self.owner_at(address)
            if owner is None:
                return address
            self.attribute(owner, name)
        self.hooks_of(self._root)
        self.settle()
        return None

    def settle(self) -> Guards:
        """:attr:`guards`, with what may have been read of modules and classes that were met."""
        self.spread()
        self.guards.settle()
        return self.guards

    def spread(self) -> None:
        """Read what is named of all that was met."""
        self.spaces.settle()
        for function in self._importing:  # grows
            names = names_of(function.__code__)
            for module in (module for name in names.imports for module in imported_by(function, name)):
                self._named(module, names.attributes)
            self.spaces.settle()
        self._importing.clear()
        while self._late:
            late = self._late.pop()
            self.hooks_of(late)
            for name in (*own_names(late), "forward"):
                self.attribute(late, name)
            self.spread()

    # ------------------------------------------------------------ attributes

    def attribute(self, owner: Any, name: str) -> None:
        """``owner.name`` was read, whether or not there is one."""
        if not self.is_over:
            self.asked.append((self._addresses[id(owner)], name))
        own = own_names(owner)
        is_module = self._is_module(owner)
        if is_module and name in OWN:
            return
        label = self.label(owner, name)
        if is_module and name == "_modules":
            self._contents(own[name], f"the submodules of {self.label(owner, '')}".rstrip("."))
        elif is_module and name in HOOKS:
            if owner is not self._root:
                self._hooks(owner, name)
        elif name in own:
            self.reading(own, name, label)
        elif is_module and any(name in own[table] for table in SHAPED):
            self._registered(own, name, label)
        else:
            self._of_class(owner, own, name, label)

    def _is_module(self, owner: Any) -> bool:
        """What a class says of itself is asked once for each of its objects: configs answer by code of their own."""
        found = self._modules.get(id(owner))
        if found is None:
            found = self._modules[id(owner)] = isinstance(owner, nn.Module)
        return found

    def _registered(self, own: dict[str, Any], name: str, label: str) -> None:
        table = next(own[key] for key in SHAPED if name in own[key])
        self.reading(table, name, label, by_type=table is not own["_modules"])

    def _of_class(self, owner: Any, own: dict[str, Any], name: str, label: str) -> None:
        """A reading that the class answers, or nobody."""
        cls = next((base for base in type(owner).__mro__ if name in vars(base)), None)
        found = vars(cls)[name] if cls is not None else None
        ours = cls is None or is_users_class(cls) or name == "forward"
        if ours and not hasattr(type(found), "__set__"):
            self.missing(own, name, label)
            if cls is None and self._is_module(owner):
                for table in SHAPED:
                    self.missing(own[table], name, label)
        if cls is not None and is_users_class(cls):
            if hasattr(type(found), "__set__") and not isinstance(found, property):  # a slot
                self.reading(Slots(owner), name, label)
            else:
                self.reading(self._class(cls), name, f"{cls.__name__}.{name}")
                for function in functions_of(found):
                    self._by_class(type(owner), names_of(function.__code__).attributes)

    def _by_class(self, cls: type, names: Iterable[str]) -> None:
        """What a method may read of its class: ``cls.scale``, ``type(self).scale``, ``self.__class__.scale``."""
        bases = (*cls.__mro__, *getmro(type(cls)))
        holders, left = dict[str, type](), set(names)
        for base in up_to_users(bases):
            here = self._class(base).keys() & left
            holders.update(dict.fromkeys(here, base))
            left -= here
        for name in sorted(name for name, holder in holders.items() if is_users_class(holder)):
            holder = holders[name]
            if isinstance(vars(holder)[name], property) and holder not in cls.__mro__:  # of the metaclass
                self.reading(self._class(holder), name, f"{holder.__name__}.{name}")
            if not hasattr(type(vars(holder)[name]), "__get__"):  # a method is seen when it is read
                self.reading(self._class(holder), name, f"{holder.__name__}.{name}")
                for base in bases[: bases.index(holder)]:
                    self.missing(self._class(base), name, f"{base.__name__}.{name}")

    def names_of(self, owner: Any) -> None:
        """``vars(owner)`` was read, and with it any attribute that there is, or is not."""
        own, label = own_names(owner), self.label(owner, "").rstrip(".") or "the model"
        if not self._is_new(own, "names"):
            return
        is_module = isinstance(owner, nn.Module)
        self.guards.questions.append(question_of_names(own, OWN if is_module else set(), label))
        for name in list(own):
            if not is_module or name not in OWN:
                self.attribute(owner, name)

    def _class(self, cls: type) -> Mapping[str, Any]:
        if cls not in self._classes:
            self.kept.meet(cls)
        return self._classes.setdefault(cls, vars(cls))  # vars gives another view each time

    def hooks_of(self, owner: nn.Module) -> None:
        """``owner`` is called, and so its hooks are."""
        for name in HOOKS:
            self._hooks(owner, name)

    def _hooks(self, owner: nn.Module, name: str) -> None:
        hooks, label = owner.__dict__[name], self.label_of_hooks(owner, name)
        if not hooks and self._is_new(hooks, None):
            self.guards.quiet.append((hooks, label))
        elif hooks:
            self._contents(hooks, label)

    # ------------------------------------------------------------ names

    def reading(self, table: Any, key: Any, label: str, *, by_type: bool = False) -> None:
        """``table[key]`` has a value, which is looked into."""
        if self._is_new(table, key) and (type(table) is not Slots or table.has(key)):
            value = table[key]
            self.guards.readings.append(Reading(table, key, value, label, by_type))
            self.look_into(value, label)

    def missing(self, table: Mapping[str, Any], key: str, label: str) -> None:
        """``table[key]`` has no value."""
        if self._is_new(table, key):
            self.guards.absent.append((table, key, label))

    def _is_new(self, table: Any, key: Any) -> bool:
        identity = id(table) if not isinstance(table, (Cell, Slots)) else id(table.of)
        if (identity, key) in self._known:
            return False
        self._known.add((identity, key))
        self._alive.append(table)
        return True

    # ------------------------------------------------------------ values

    def look_into(self, value: Any, label: str) -> None:
        """Follow a value that was read."""
        kind = type(value)
        if kind in _PLAIN:
            return
        if kind is FunctionType:
            self.function(value)
            return
        if isinstance(value, nn.Module) and not self.knows(value):
            for path, module in value.named_modules():
                if id(module) not in self._paths:
                    self._paths[id(module)] = f"{label}.{path}" if path else label
                    self._settle_at(module, self._paths[id(module)])
                    self._late += [module] if self.is_over else []
        self.kept.meet(value)
        if isinstance(value, (ModuleType, type)):
            self.spaces.meet(value)
            return
        if is_plain(value) or isinstance(value, (nn.Module, Tensor)):
            return
        for function in functions_of(value):
            self.function(function)
        question = question_of(value, label)
        if question is not None and self._is_new(value, "asked"):
            self.guards.questions.append(question)
        if isinstance(value, (MethodType, ReferenceType)):
            self.look_into(value.__self__ if isinstance(value, MethodType) else value(), label)
        elif isinstance(value, partial):
            self._contents(value.args, label)
            self._contents(value.keywords, label)
        elif isinstance(value, CONTAINERS):
            self._contents(value, label)
        elif isinstance(value, MappingProxyType):
            self._contents(tuple(value.values()), label)
        elif kind.__module__ != "builtins" and isinstance(value, HOLDERS):
            self._contents(vars(value), label)
        elif (state := state_of(value)) is not None and self._is_new(value, "state"):
            self.generators.append((label, state, repr(state())))
        elif (
            is_users_class(type(value))
            and id(value) not in self.objects
            and not callable(getattr(value, "__get__", None))
        ):
            self.objects[id(value)] = (value, label)
            self._settle_at(value, label)
            self.on_class(type(value))
            if self.is_over:
                self.spaces.meet(value)

    def _contents(self, container: Any, label: str) -> None:
        if not self._is_new(container, None):
            return
        met = Contents.of(container, label)
        if len(met.items) <= MOST_ITEMS:
            self.guards.contents.append(met)
        self.started.append(met)
        for item in met.items[:MOST_ITEMS]:
            if isinstance(item, Tensor) and not isinstance(item, nn.Parameter):
                self.guards.written.append((item, version_of(item), label))
            self.look_into(item, label)

    # ------------------------------------------------------------ functions

    def function(self, function: FunctionType) -> None:
        """The globals and variables of enclosing functions that ``function`` names, and those of what it calls."""
        if not is_users(function.__module__) or not self.may_have_run(function) or not self._is_new(function, None):
            return
        self.kept.meet(function)
        self._waiting.append(function)
        if len(self._waiting) > 1:
            return  # followed below: what calls what may be deeper than Python's stack
        try:
            while self._waiting:
                self._names(self._waiting[0])
                self._waiting.popleft()
        finally:
            self._waiting.clear()

    def has_followed(self, function: FunctionType) -> bool:
        return (id(function), None) in self._known

    def _names(self, function: FunctionType) -> None:
        names, where = names_of(function.__code__), function.__module__
        if "site-packages" not in function.__code__.co_filename:
            self.guards.functions.append((function, PARTS(function)))
        self.spaces.name(names.attributes)
        self._importing += [function] * bool(names.imports)
        for name, chain in names.globals:
            if name in function.__globals__:
                self._global(function.__globals__, name, f"{name} (global of {where})", chain)
        for name in names.texts:
            read = self.reading if name in function.__globals__ else self.missing
            read(function.__globals__, name, f"{name} (global of {where})")
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        for name, chain in names.cells:
            if name in cells and not is_empty(cells[name]):
                label = f"{name} (variable around {function.__qualname__})"
                self._global(Cell(cells[name]), "cell_contents", label, chain)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.look_into(value, f"a default argument of {function.__qualname__}")
        for cls in superclasses_of(function) if any(name == "super" for name, _ in names.globals) else ():
            for name in names.attributes:
                for inner in functions_of(vars(cls).get(name)):
                    self.function(inner)

    def _named(self, space: Space, names: Iterable[str]) -> None:
        """Of ``space`` the attributes of these names are read, as far as it has them."""
        if isinstance(space, type):
            self._by_class(space, names)
            return
        if not isinstance(space, ModuleType):
            for name in attributes_named(space, names):
                self.attribute(space, name)
            return
        for name in (name for name in names if name in vars(space)):
            self.reading(vars(space), name, f"{space.__name__}.{name}")

    def _global(self, table: Any, key: str, label: str, chain: Sequence[str]) -> None:
        """``table[key]`` is read, and of it the attributes of ``chain``, each of the one before."""
        value = table[key]
        if isinstance(value, nn.Module) and value.__class__.__module__.startswith("torch.fx"):
            return
        if not chain or not isinstance(value, ModuleType):
            self.reading(table, key, label)
            if isinstance(value, (ModuleType, type)):
                self.spaces.meet(value)
        elif self._is_new(table, key):  # of a module no more is read than the chain says
            self.guards.readings.append(Reading(table, key, value, label))
        for attribute in chain:
            space = space_of(value, attribute, self._class)
            if space is None:
                return
            label = f"{getattr(value, '__name__', '')}.{attribute}"
            if any(space is one for one in OF_TORCH):
                self._of_torch(space, attribute, label)
            elif not isinstance(value, ModuleType) or is_users(value.__name__):
                self.reading(space, attribute, label)
            value = space[attribute]

    def _of_torch(self, space: dict[str, Any], name: str, label: str) -> None:
        if self._is_new(space, name):
            self.guards.readings.append(Reading(space, name, space[name], label, of_torch=True))
            for function in functions_of(space[name]):
                self.function(function)
