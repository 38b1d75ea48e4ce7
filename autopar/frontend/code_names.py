"""The names that a function reads outside itself, by its bytecode: globals, variables of enclosing functions."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL")
CELLS = ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", "STORE_DEREF")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
NOT_USERS = {
    "autopar", "torch", "numpy", "torchgen", "einops", "einx", "jaxtyping", "beartype", "builtins",
    *sys.stdlib_module_names,
}  # fmt: skip

OUR_MODELS = "autopar.models"  # are models like others


@dataclass(frozen=True)
class Names:
    """Each with the attribute that is read of it at once (``settings.SCALE``), or None; ``attributes`` are all."""

    globals: frozenset[tuple[str, str | None]]
    cells: frozenset[tuple[str, str | None]]
    attributes: frozenset[str]


@functools.cache
def names_of(code: CodeType) -> Names:
    """Of ``code`` and of the functions that are written inside it."""
    found: set[tuple[str, str | None]] = set()
    cells: set[tuple[str, str | None]] = set()
    attributes: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for step, following in zip(steps, [*steps[1:], None]):
        then = following.argval if following is not None and following.opname in ATTRIBUTES else None
        if step.opname in GLOBALS:
            found.add((step.argval, then))
        elif step.opname in CELLS:
            cells.add((step.argval, then))
        elif step.opname in (*ATTRIBUTES, "LOAD_SUPER_ATTR"):
            attributes.add(step.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            known = names_of(inner)
            found |= known.globals
            cells |= known.cells
            attributes |= known.attributes
    return Names(frozenset(found), frozenset(cells), frozenset(attributes))


def is_users(module: str | None) -> bool:
    """Whether what is defined in the module of that name is the user's, or of a library of models."""
    name = module or ""
    return name.partition(".")[0] not in NOT_USERS or name.startswith(OUR_MODELS)


def is_users_class(cls: type) -> bool:
    return is_users(cls.__module__)


def functions_of(value: Any) -> Iterator[FunctionType]:
    """The Python functions that run when ``value`` (a function, a method, a property, ...) is called or read."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        yield from functions_of(value.__func__)
    elif isinstance(value, property):
        yield from functions_of(value.fget)
    elif isinstance(value, (functools.cached_property, functools.partial, functools.partialmethod)):
        yield from functions_of(value.func)
    elif hasattr(value, "__wrapped__"):
        yield from functions_of(value.__wrapped__)
