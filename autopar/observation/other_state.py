"""State of Python that is no attribute of a module or object, and no item of a container: how a call asks for it again.

Arrays of numpy are written into without anybody being told. A context variable has a value that only it gives. The
attributes of a ``threading.local`` are those of the thread that asks. The environment is read by name.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import random
import sys
import threading
from argparse import Namespace
from array import array
from collections import ChainMap, UserDict, UserList, UserString
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import FrameType, GeneratorType, MappingProxyType, SimpleNamespace
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch

from autopar.ir.guards import Question
from autopar.ir.same_values import MISSING, is_plain
from autopar.observation.source_lines import is_users_file

EVERYTHING = "*"  # in place of the name of a variable
HOLDERS = (
    SimpleNamespace,
    Namespace,
    ChainMap,
    UserDict,
    UserList,
    UserString,
    WeakKeyDictionary,
    WeakValueDictionary,
    WeakSet,
)  # of Python's library, with attributes to read


def question_of(value: Any, label: str) -> Question | None:
    """How to ask for what ``value``, which was read, holds; None where it is compared otherwise."""
    ask: Callable[[], Any] | None = None
    if isinstance(value, ContextVar):
        ask = partial(_in_context, value)
    elif isinstance(value, threading.local):
        ask = partial(_attributes, value)
    elif isinstance(value, MappingProxyType):
        ask = partial(_entries, value)
    elif isinstance(value, (bytearray, array, memoryview)):
        ask = partial(bytes, value)
    elif isinstance(value, (KeysView, ValuesView, ItemsView)):
        ask = partial(_seen, value)
    elif (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.ndarray):
        mask = getattr(value, "mask", None)  # of numpy.ma
        ask = partial(_digest, value, mask if isinstance(mask, numpy.ndarray) else None)
    return Question(ask, ask(), f"what {label} holds") if ask is not None else None


def question_of_variable(name: str) -> Question:
    """Of an environment variable."""
    if name == EVERYTHING:
        return Question(_environment, _environment(), "the environment")
    ask = partial(os.environ.get, name)
    return Question(ask, ask(), f"the environment variable {name}")


def _environment() -> tuple[tuple[str, str], ...]:
    return tuple(sorted(os.environ.items()))


def question_of_names(own: dict[str, Any], but: set[str], label: str) -> Question:
    """Which attributes there are, beside those in ``but``."""
    ask = partial(_names, own, but)
    return Question(ask, ask(), f"what attributes {label} has")


def variables_of_users(met: set[str]) -> Callable[[], Any]:
    """A context within which ``met`` collects the environment variables that code of users asks for."""

    @contextmanager
    def watched() -> Iterator[None]:
        environment: Any = type(os.environ)
        get, walk, count = environment.__getitem__, environment.__iter__, environment.__len__
        asked = partial(_is_asked_by_user, threading.get_ident())

        def read(self: Any, key: Any) -> Any:
            if asked(sys._getframe(1)):
                met.add(os.fsdecode(key) if isinstance(key, (str, bytes)) else str(key))
            return get(self, key)

        def all_of(self: Any) -> Any:
            if asked(sys._getframe(1)):
                met.add(EVERYTHING)
            return walk(self)

        def count_of(self: Any) -> Any:
            if asked(sys._getframe(1)):
                met.add(EVERYTHING)
            return count(self)

        with (
            mock.patch.object(environment, "__getitem__", read),
            mock.patch.object(environment, "__iter__", all_of),
            mock.patch.object(environment, "__len__", count_of),
        ):
            yield

    return watched


def _is_asked_by_user(thread: int, frame: FrameType | None) -> bool:
    """Whether a user's file asks ``os.environ`` on ``thread``, perhaps through ``os.getenv`` or ``Mapping.get``."""
    if threading.get_ident() != thread:
        return False
    while frame is not None and frame.f_code.co_filename.startswith(_THROUGH):
        frame = frame.f_back
    return frame is not None and is_users_file(frame.f_code.co_filename)


_THROUGH = ("<frozen os>", "<frozen _collections_abc>", str(os.__file__))


def _in_context(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return MISSING


def _attributes(local: threading.local) -> tuple[Any, ...]:
    own = vars(local)
    return (*own, *own.values())


def _names(own: dict[str, Any], but: set[str]) -> tuple[str, ...]:
    return tuple([name for name in own if name not in but])


def _entries(proxy: MappingProxyType[Any, Any]) -> tuple[Any, ...]:
    return (*proxy, *proxy.values())


def _seen(view: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(view)


def _digest(values: Any, mask: Any) -> tuple[Any, ...]:
    """Of an array of objects these themselves."""
    if values.dtype.hasobject:
        return str(values.dtype), tuple(values.shape), tuple(values.ravel().tolist())
    content = [
        hashlib.blake2b(part.tobytes(), digest_size=16).hexdigest() for part in (values, mask) if part is not None
    ]
    return str(values.dtype), tuple(values.shape), *content


def state_of(value: Any) -> Callable[[], Any] | None:
    """What gives the state of a random number generator, or how far an iterator is; None for anything else."""
    if isinstance(value, random.Random):
        return value.getstate
    if type(value).__module__.startswith("numpy.random"):
        bits = getattr(value, "bit_generator", None) or getattr(value, "_bit_generator", value)
        return lambda: bits.state
    if isinstance(value, torch.Generator):
        return lambda: value.get_state().tolist()
    if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        return partial(_position, value)
    return None


def is_position(state: Callable[[], Any]) -> bool:
    """Whether ``state`` is of an iterator."""
    return isinstance(state, partial) and state.func is _position


def _position(iterator: Any) -> Any:
    """Another one after each ``next(iterator)``, as far as it can be told."""
    if isinstance(iterator, GeneratorType):
        frame = iterator.gi_frame
        here = frame.f_locals.items() if frame is not None else ()
        return None if frame is None else (frame.f_lasti, [(name, *_known_by(one)) for name, one in here])
    if hasattr(iterator, "__length_hint__"):
        return iterator.__length_hint__()
    if isinstance(iterator, itertools.count):
        return repr(iterator)
    try:
        return hashlib.blake2b(pickle.dumps(iterator)).hexdigest()
    except Exception:  # of what it goes through, which may be anything
        return None


def _known_by(value: Any) -> tuple[Any, ...]:
    return (
        (value,) if is_plain(value) else (type(value), id(value), *([_position(value)] * isinstance(value, Iterator)))
    )
