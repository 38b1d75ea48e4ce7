"""The names that a function reads outside itself, by its bytecode: globals, variables of enclosing functions."""

from __future__ import annotations

import dis
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import getattr_static
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from autopar.ir.same_values import PLAIN

GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
CELLS = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", "STORE_DEREF")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
IMPORTS = ("IMPORT_NAME",)
PARTS = ("IMPORT_FROM",)
NOT_USERS = {
    "autopar", "torch", "numpy", "torchgen", "einops", "einx", "jaxtyping", "beartype", "builtins",
    *sys.stdlib_module_names,
}  # fmt: skip

# names that something else may be read by, which is named in a text
BY_TEXT = {"getattr", "hasattr", "vars", "eval", "exec", "__dict__"}
RUNNING = {"eval", "exec"}
OF_GLOBALS = {"globals", "f_globals", *RUNNING}
OF_MODULES = {"modules", "import_module", "__import__"}
ITSELF = "__name__"  # of the module in which code stands
OUR_MODELS = "autopar.models"  # are models like others
WRAPPED = "__wrapped__"


@dataclass(frozen=True)
class Names:
    """Each with the attributes that are read of it at once (``settings.model.SCALE``); sorted, as processes differ.

    Attributes:
        attributes: all of them, also those that ``from settings import SCALE`` or ``getattr(x, "SCALE")`` reads.
        imports: modules that are imported within the code.
        texts: names that may be globals' too, as in ``globals()["SCALE"]``.
    """

    globals: tuple[tuple[str, tuple[str, ...]], ...]
    cells: tuple[tuple[str, tuple[str, ...]], ...]
    attributes: tuple[str, ...]
    imports: tuple[str, ...]
    texts: tuple[str, ...] = ()


def names_of(code: CodeType) -> Names:
    """Of ``code`` and of the functions that are written inside it."""
    found = _KNOWN.get(id(code))
    if found is None:
        known = (look(code) for look in _LOOKS)
        found = _KNOWN[id(code)] = code, next((names for names in known if names is not None), None) or _names_in(code)
    return found[1]


@contextmanager
def names_found_by(look: Callable[[CodeType], Names | None]) -> Iterator[None]:
    """Within this context, the names of code that nobody has asked for yet are what ``look`` finds, if anything."""
    _LOOKS.append(look)
    try:
        yield
    finally:
        _LOOKS.remove(look)


_KNOWN: dict[int, tuple[CodeType, Names]] = {}  # by address, kept alive: hashing code takes longer
_LOOKS: list[Callable[[CodeType], Names | None]] = []


def _names_in(code: CodeType) -> Names:
    found: set[tuple[str, tuple[str, ...]]] = set()
    cells: set[tuple[str, tuple[str, ...]]] = set()
    attributes: set[str] = set()
    imports: set[str] = set()
    words: set[str] = set()
    chain: tuple[str, ...] = ()  # of the attributes that are read after the step that is looked at
    for step, name in reversed(list(_steps(code))):
        if step in _GLOBALS:
            found.add((name, chain))
        elif step in _CELLS:
            cells.add((name, chain))
        elif step in _IMPORTS:
            imports.add(name)
        elif name:
            attributes.add(name)
        chain = (name, *chain) if step in _ATTRIBUTES else ()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            known = names_of(inner)
            found.update(known.globals)
            cells.update(known.cells)
            attributes.update(known.attributes)
            imports.update(known.imports)
            words.update(known.texts)
    named = {name for name, _ in found} | attributes
    texts = [text for text in code.co_consts if isinstance(text, str)]
    if named & BY_TEXT:
        attributes.update(filter(str.isidentifier, texts))
    if named & OF_GLOBALS:
        words.update(word for text in texts for word in _words(text, bool(named & RUNNING)))
    if named & OF_MODULES:
        imports.update(text for text in texts if all(map(str.isidentifier, text.split("."))))
        imports.update(named & {ITSELF})
    globals_, around = tuple(sorted(found, key=str)), tuple(sorted(cells, key=str))
    return Names(globals_, around, tuple(sorted(attributes)), tuple(sorted(imports)), tuple(sorted(words)))


def _words(text: str, is_code: bool) -> list[str]:
    """The names in ``text``, which is one, or code."""
    return re.findall(r"[^\W\d]\w*", text) if is_code else [text] * text.isidentifier()


def imported_by(function: FunctionType, name: str) -> Iterator[ModuleType]:
    """The loaded modules of users that ``import name`` or ``from .name import`` in ``function`` may mean.

    ``__name__`` is that in which it stands.
    """
    name = str(function.__globals__.get(name)) if name == ITSELF else name
    package = str(function.__globals__.get("__package__") or "")
    places = [name]
    while package:
        places.append(f"{package}.{name}" if name else package)
        package = package.rpartition(".")[0]
    for module in map(sys.modules.get, places):
        if isinstance(module, ModuleType) and is_users(module.__name__):
            yield module


def _steps(code: CodeType) -> Iterator[tuple[int, str]]:
    """The instructions of ``code`` that read names, with these; those between them as one without.

    As ``dis`` has them, in a tenth of its time.
    """
    variables = (*code.co_varnames, *(name for name in code.co_cellvars if name not in code.co_varnames))
    variables += code.co_freevars
    steps, arguments, names, wide = code.co_code[::2], code.co_code[1::2], code.co_names, 0
    for run in _RUN.finditer(steps):
        for step, low in zip(run[0], arguments[run.start() : run.end()]):
            if step == _WIDE:
                wide = (wide | low) << 8
            elif step in _SHIFTS:
                yield step, names[(wide | low) >> _SHIFTS[step]]
                wide = 0
            elif step in _CELLS:
                yield step, variables[wide | low]
                wide = 0
        yield _ANOTHER, ""


def _numbers(names: Iterable[str]) -> frozenset[int]:
    return frozenset(dis.opmap[name] for name in names if name in dis.opmap)


_GLOBALS, _CELLS, _ATTRIBUTES, _IMPORTS = map(_numbers, (GLOBALS, CELLS, ATTRIBUTES, IMPORTS))
_PASSING = _numbers(("CACHE", "PUSH_NULL"))
_WIDE = dis.opmap["EXTENDED_ARG"]
# instruction -> lowest bits of its argument that are flags, not part of the number of a name
_FLAGS = {"LOAD_GLOBAL": 1, "LOAD_ATTR": int(sys.version_info >= (3, 12)), "LOAD_SUPER_ATTR": 2}
_SHIFTS = {
    dis.opmap[name]: _FLAGS.get(name, 0)
    for name in (*GLOBALS, *ATTRIBUTES, *IMPORTS, *PARTS, "LOAD_SUPER_ATTR")
    if name in dis.opmap
}
_ANOTHER = -1


def _any_of(steps: Iterable[int]) -> bytes:
    return b"[" + re.escape(bytes(sorted(steps))) + b"]"


# what reads names one after the other
_RUN = re.compile(
    b"(?:" + _any_of([_WIDE]) + b"*" + _any_of([*_SHIFTS, *_CELLS]) + _any_of(_PASSING) + b"*)+", re.DOTALL
)


@functools.cache
def is_users(module: str | None) -> bool:
    """Whether what is defined in the module of that name is the user's, or of a library of models."""
    name = module or ""
    return name.partition(".")[0] not in NOT_USERS or name.startswith(OUR_MODELS)


def is_users_class(cls: type) -> bool:
    return is_users(cls.__module__)


def functions_of(value: Any) -> tuple[FunctionType, ...]:
    """The Python functions that run when ``value`` (a function, a method, a property, ...) is called or read."""
    for _ in range(sys.getrecursionlimit()):  # what wraps itself has none
        kind = type(value)
        if kind is FunctionType:
            return (value,)
        if kind in _PLAIN:
            return ()
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, (functools.cached_property, functools.partial, functools.partialmethod)):
            value = value.func
        else:
            value = _wrapped_by(value)
    return ()


_PLAIN = frozenset(PLAIN)


def _wrapped_by(value: Any) -> Any:
    """As ``getattr_static(value, "__wrapped__", None)``, which takes 8 us: what ``functools.cache`` and others wrap.

    Not ``getattr``: an object may answer to every name.
    """
    bases: tuple[type, ...] = value.__mro__ if isinstance(value, type) else ()
    for kind in (*bases, *type(value).__mro__):
        if WRAPPED in kind.__dict__:
            return getattr_static(value, WRAPPED, None)
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return own.get(WRAPPED) if type(own) is dict else None if bases else getattr_static(value, WRAPPED, None)
