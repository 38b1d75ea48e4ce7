"""Digests of Python values, equal in another process for what a trace could not tell apart.

A value that has no such digest (a socket, a random number generator, an object of a class in C) is refused with
:class:`autopar.cache.reasons.Unstorable`: where it is read, a program cannot be kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import logging
import operator
import os
import re
import struct
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autopar.cache.code_digests import code_digest, digest, digest_of_bytes, inner_code
from autopar.cache.reasons import Unstorable
from autopar.ir.same_values import PLAIN
from autopar.observation.code_names import is_users, is_users_class
from autopar.observation.source_lines import is_users_file

Of = Callable[["Digests", Any], Any]
SEPARATOR = "\0"  # of names
_PASSING = ("__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl", "__annotations__", "__firstlineno__")
_BY_TEXT = (
    types.GenericAlias, inspect.Signature, inspect.Parameter, slice, range, PurePath, torch.memory_format, torch.layout,
)  # fmt: skip
_BY_TEXT_IN = ("typing", "datetime", "decimal", "fractions")  # modules whose objects are what they print
_BY_KIND = ("_thread", "threading", "_weakrefset", "_abc")  # hold nothing that a trace takes


class Digests:
    """Digests of the values of one model, as they are now.

    ``address`` says how a module, or an object whose attributes are compared one by one, is known; None for others.

    What a value consists of is said once, for digests and for transcripts (:mod:`autopar.cache.transcript`), which
    put other things in place of :meth:`of`, :meth:`leniently` and :meth:`join`.

    Attributes:
        code: all code of users' that went into a digest.
        functions: the functions that have it.
    """

    def __init__(self, address: Callable[[Any], str | None]) -> None:
        self._address = address
        self._known: dict[int, str] = {}
        self._alive: list[Any] = []  # so that no id is used twice
        self._open: set[int] = set()
        self._slots: dict[type, dict[str, Any] | None] = {}
        self._classes: dict[type, Any] = {}
        self.code: set[CodeType] = set()
        self.functions: list[FunctionType] = []

    def of(self, value: Any) -> Any:
        """Raises Unstorable."""
        kind = type(value)
        if kind in PLAIN:
            return f"{kind.__name__} {value!r}"
        if id(value) in self._known:
            return self._known[id(value)]
        if id(value) in self._open:
            return "what it is part of"
        self._open.add(id(value))
        try:
            found: str = form_of(value, kind)(self, value)
        finally:
            self._open.discard(id(value))
        self._known[id(value)] = found
        self._alive.append(value)
        return found

    def leniently(self, value: Any) -> Any:
        """As :meth:`of`; what has no digest is known by its class."""
        try:
            return self.of(value)
        except Unstorable:
            return digest("some", _name(type(value)))

    def join(self, *parts: Any) -> Any:
        """Of texts, and of what :meth:`of` and :meth:`leniently` gave."""
        return digest(*parts)

    def in_order(self, container: Any) -> list[str]:
        """Of a set: the same for equal ones in every process."""
        return sorted(map(self.of, container))

    def of_tensor(self, tensor: Tensor, *, content: bool) -> Any:
        """``content``: with the values in it, else of its kind alone."""
        parts = [_name(type(tensor)), str(tuple(tensor.shape)), str(tensor.dtype), str(tensor.requires_grad)]
        parts += [str(tensor.layout), tensor.device.type]
        if content:
            parts.append(_content(tensor))
        return self.join("tensor", *parts)

    # ------------------------------------------------------------ code

    def function(self, function: FunctionType) -> Any:
        code, where = function.__code__, f"{function.__module__}.{function.__qualname__}"
        around = function.__closure__
        inside = [self.leniently(cell.cell_contents) for cell in around if _may_run(cell)] if around else ()
        if not is_code_of_users(function):
            return self.join("function", where, str(code.co_firstlineno), *inside)
        self._meet(function)
        defaults = function.__defaults__ or ()
        if function.__kwdefaults__:
            defaults = (*defaults, *sorted(function.__kwdefaults__.items()))
        return self.join(f"function {where} {code_digest(code)}", *map(self.leniently, defaults), *inside)

    def _meet(self, function: FunctionType) -> None:
        self.code.update(inner_code(function.__code__))
        self.functions.append(function)

    def cls(self, cls: type) -> Any:
        """Of a class of users' all that stands in it and in its bases; another is known by its name."""
        if not is_users_class(cls):
            return self.join("class", _name(cls))
        kept = {key: value for key, value in vars(cls).items() if key not in _PASSING}
        about = f"{_name(cls)} {_name(type(cls))} {SEPARATOR.join(map(str, kept))}"
        return self.join("class", about, *map(self.of, cls.__bases__), *map(self.leniently, kept.values()))

    def _class_of_module(self, cls: type) -> Any:
        """As :meth:`cls`, with what somebody has put into torch's own classes."""
        if cls not in self._classes:
            parts = [self.of(cls)]
            for base in cls.__mro__:
                if not is_users_class(base):
                    ours = [value for value in vars(base).values() if type(value) is FunctionType]
                    parts += [self.of(one) for one in ours if is_users_file(one.__code__.co_filename)]
            self._classes[cls] = self.join(*parts)
        return self._classes[cls]

    # ------------------------------------------------------------ objects

    def _module(self, module: nn.Module) -> Any:
        address, cls = self._address(module), self._class_of_module(type(module))
        if address is not None:  # its attributes are compared one by one
            return self.join("module", address, cls)
        return self.join("module", "", cls, *self._attributes(vars(module)))

    def _enum(self, member: enum.Enum) -> Any:
        return self.join("enum", _name(type(member)), member.name, self.leniently(member.value))

    def _other(self, value: Any) -> Any:
        """Of what has no form of its own."""
        kind = type(value)
        if isinstance(value, _BY_TEXT) or kind.__module__ in _BY_TEXT_IN:
            return self.join(_name(kind), repr(value))
        if kind.__module__ in _BY_KIND:
            return self.join("of no matter", _name(kind))
        if kind.__module__.partition(".")[0] == "numpy":
            return self.join("numpy", _name(kind), _of_numpy(value))
        if hasattr(value, "__wrapped__"):  # functools.cache
            return self.join("wrapped", self.of(value.__wrapped__))
        return self._object(value, kind)

    def _object(self, value: Any, kind: type) -> Any:
        address = self._address(value)
        if address is not None:  # its attributes are compared one by one
            return self.join("object", address, self.of(kind))
        own = vars_of(value, self._slots)
        if own is None:
            raise Unstorable(f"a {_name(kind)}, whose state cannot be compared")
        return self.join("object", self.of(kind), *self._attributes(own))

    def _attributes(self, own: Mapping[str, Any]) -> list[Any]:
        keys = sorted(own)
        return [SEPARATOR.join(map(str, keys)), *(self.of(own[key]) for key in keys)]

    def items(self, container: Any) -> Iterator[Any]:
        if type(container) in (list, tuple):
            yield from map(self.of, container)
        elif isinstance(container, (set, frozenset)):
            yield from self.in_order(container)
        elif isinstance(container, Mapping):
            own: Any = container  # a dict's own items: what a class makes of them may load modules, or fail
            for key, value in dict.items(own) if isinstance(own, dict) else own.items():
                yield self.of(key)
                yield self.of(value)
        else:
            yield from map(self.of, container)

    def _container(self, container: Any) -> Any:
        own = getattr(container, "__dict__", {})
        items = list(self.items(container))
        return self.join("container", str(len(items)), self.of(type(container)), *items, *self._attributes(own))

    def _method(self, method: MethodType) -> Any:
        return self.join("method", self.of(method.__func__), self.of(method.__self__))

    def _builtin(self, function: types.BuiltinFunctionType) -> Any:
        owner = function.__self__
        bound = "" if owner is None or isinstance(owner, ModuleType) else self.of(owner)
        return self.join("builtin", str(function.__module__), function.__qualname__, bound)

    def _partial(self, partial: functools.partial[Any]) -> Any:
        return self.join("partial", self.of(partial.func), self.of(partial.args), self.of(partial.keywords))

    def _property(self, found: property) -> Any:
        return self.join("property", *map(self.of, (found.fget, found.fset, found.fdel)))

    def _field(self, field: dataclasses.Field[Any]) -> Any:
        if type(field) is not dataclasses.Field:
            return self._object(field, type(field))
        metadata = self.items(field.metadata) if field.metadata else ()
        flags = _FLAGS(field)
        if any(type(flag) not in (bool, type(None)) for flag in flags):
            return self.join("field", *map(self.of, _FIELD(field)), *metadata)
        about = f"field {field.name} {flags} {getattr(field._field_type, 'name', '')}"  # type: ignore[attr-defined]
        return self.join(about, *map(self.of, (field.type, field.default, field.default_factory)), *metadata)

    def _union(self, union: types.UnionType) -> Any:
        if all(type(each) is type and not is_users_class(each) for each in union.__args__):
            return self.join("union", repr(union))  # as each of these is known by its name
        return self.join("union", *map(self.of, union.__args__))

    def _custom_operator(self, found: Any) -> Any:
        own = [value for value in vars(found).values() if isinstance(value, FunctionType)]
        return self.join("custom operator", found._qualname, *map(self.of, own))


def is_code_of_users(function: FunctionType) -> bool:
    return is_users(function.__module__) or is_users_file(function.__code__.co_filename)


def vars_of(value: Any, known: dict[type, dict[str, Any] | None]) -> dict[str, Any] | None:
    """The attributes of an object, those in slots too; None where its class keeps more than these, as those in C do.

    ``known``: the slots of classes that were looked at already.
    """
    cls = type(value)
    if cls not in known:
        known[cls] = _slots_of(cls)
    slots = known[cls]
    if slots is None:
        return None
    found: dict[str, Any] = dict(getattr(value, "__dict__", {}))
    for key, slot in slots.items():
        with contextlib.suppress(AttributeError):  # it was never set
            found[key] = slot.__get__(value)
    return found


def _slots_of(cls: type) -> dict[str, Any] | None:
    """Name -> slot; None where instances keep more than in these and in their attributes."""
    slots = {
        key: found
        for base in cls.__mro__
        for key, found in vars(base).items()
        if isinstance(found, types.MemberDescriptorType)
    }
    tables = (cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0)  # pointers that an object holds itself
    return None if cls.__basicsize__ > object.__basicsize__ + _POINTER * (len(slots) + tables) else slots


_POINTER = struct.calcsize("P")


def _may_run(cell: Any) -> bool:
    """Whether the variable of an enclosing function is, or holds, something to be called."""
    try:
        value = cell.cell_contents
    except ValueError:  # it is empty
        return False
    held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else (value,)
    return any(callable(item) and not isinstance(item, (nn.Module, Tensor)) for item in held)


def _content(tensor: Tensor) -> str:
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
        raise Unstorable(f"a {type(tensor).__name__} without plain data ({tensor.device}, {tensor.layout})")
    flat = tensor.detach().cpu().contiguous().flatten()
    return digest(str(tuple(tensor.stride())), digest_of_bytes(flat.view(torch.uint8).numpy().data))


def _of_numpy(value: Any) -> str:
    data, name = getattr(value, "tobytes", None), getattr(value, "__qualname__", getattr(value, "__name__", None))
    if data is None and (name is not None or type(value).__name__.endswith("DType")):  # a function, or a dtype
        return f"{getattr(value, '__module__', '')}.{name or value!r}"
    if data is None or value.dtype.hasobject:
        raise Unstorable(f"a {_name(type(value))}, whose state cannot be compared")
    return f"{value.dtype} {getattr(value, 'shape', ())} {digest_of_bytes(data())}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _operator(value: Any) -> str:
    return digest("operator", str(value), str(getattr(value, "_schema", "")))


def _refused(value: Any) -> str:
    raise Unstorable(f"a {_name(type(value))}, which gives another value each time")


def form_of(value: Any, kind: type) -> Of:
    """What joins the parts of a value of this kind, looked up once for each; a proxy says itself what it is."""
    if kind in _KNOWN_FORMS and value.__class__ is kind:
        return _KNOWN_FORMS[kind]
    found = next((made for kinds, made in _FORMS if isinstance(value, kinds)), Digests._other)
    if value.__class__ is kind:
        _KNOWN_FORMS[kind] = found
    return found


# a third of what there is to compare in a model of transformers
_FIELD = operator.attrgetter(*(name for name in dataclasses.Field.__slots__ if name != "metadata"))
_FLAGS = operator.attrgetter("repr", "hash", "init", "compare", "kw_only")
_KNOWN_FORMS: dict[type, Of] = {}
_FORMS: tuple[tuple[Any, Of], ...] = (
    (enum.Enum, Digests._enum),
    (nn.Module, Digests._module),
    (Tensor, lambda own, tensor: own.of_tensor(tensor, content=True)),
    (FunctionType, lambda own, function: own.function(function)),
    (type, lambda own, cls: own.cls(cls)),
    (ModuleType, lambda own, module: own.join("module of Python", module.__name__)),
    (MethodType, Digests._method),
    ((types.BuiltinFunctionType, types.BuiltinMethodType), Digests._builtin),
    (functools.partial, Digests._partial),
    (types.UnionType, Digests._union),
    ((staticmethod, classmethod), lambda own, found: own.join(type(found).__name__, own.of(found.__func__))),
    (property, Digests._property),
    (functools.cached_property, lambda own, found: own.join("cached property", own.of(found.func))),
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator), lambda _, op: _operator(op)),
    (torch.library.CustomOpDef, Digests._custom_operator),  # type: ignore[attr-defined]
    (ContextVar, lambda own, variable: own.join("context", variable.name, own.of(variable.get(None)))),
    (threading.local, lambda own, local: own.join("of this thread", *own.items(vars(local)))),
    (weakref.ref, lambda own, reference: own.join("weak", own.of(reference()))),
    (type(os.environ), lambda *_: "the environment"),  # what is read of it is compared variable by variable
    (torch.Generator, lambda _, generator: _refused(generator)),
    (logging.Logger, lambda own, logger: own.join("logger", logger.name)),
    (dataclasses.Field, Digests._field),
    (re.Pattern, lambda own, pattern: own.join("pattern", repr(pattern.pattern), str(pattern.flags))),
    (CodeType, lambda _, code: code_digest(code)),
    (
        (types.WrapperDescriptorType, types.MethodDescriptorType, types.MethodWrapperType, types.GetSetDescriptorType),
        lambda own, found: own.join("descriptor", repr(getattr(found, "__objclass__", "")), found.__name__),
    ),
    (types.MemberDescriptorType, lambda own, found: own.join("slot", found.__name__)),
    ((list, tuple, dict, set, frozenset, deque, types.MappingProxyType), Digests._container),
    ((type(Ellipsis), type(NotImplemented)), lambda _, found: repr(found)),
)
