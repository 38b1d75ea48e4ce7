"""The names that code reads outside itself, and what they lead to: ``torch.nn.functional.gelu``, not ``torch``."""

from __future__ import annotations

import builtins
import dis
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from autopar.cache.code_digests import inner_code
from autopar.cache.reasons import Unstorable

IMPORT = "import "


@dataclass(frozen=True, order=True)
class Name:
    """``chain`` as the module called ``module`` reads it, in the function ``user``; imports begin with ``import``."""

    module: str
    chain: tuple[str, ...]
    user: str = ""

    def value(self) -> tuple[Any, str]:
        """What it is now, followed through modules, and its full name if it went through any; None if it is nothing."""
        first, *rest = self.chain
        if first.startswith(IMPORT):
            value: Any = sys.modules.get(first.removeprefix(IMPORT))
        else:
            table = vars(sys.modules[self.module]) if self.module in sys.modules else {}
            value = table.get(first, getattr(builtins, first, None))
        full = ""
        for part in rest:
            if not isinstance(value, ModuleType):
                break
            full, value = f"{value.__name__}.{part}", vars(value).get(part)
        return value, full


def names_in(functions: Iterable[FunctionType], code: Iterable[CodeType]) -> list[Name]:
    """Those that ``functions`` use in what has run of them, which is among ``code``. Raises Unstorable."""
    ran, found = set(code), dict[tuple[str, tuple[str, ...]], Name]()
    for function in functions:
        module = function.__globals__.get("__name__")
        if vars(sys.modules.get(str(module), builtins)) is not function.__globals__:
            raise Unstorable(f"{function.__qualname__} is defined in no module that can be imported")
        for part in inner_code(function.__code__):
            for chain in chains_of(part) if part in ran else ():
                found.setdefault((str(module), chain), Name(str(module), chain, function.__qualname__))
    return sorted(found.values())


@cache
def chains_of(code: CodeType) -> frozenset[tuple[str, ...]]:
    """The names that ``code`` reads outside itself, with the attributes that it reads of each at once.

    What it imports begins with ``import``.
    """
    return frozenset(_chains(code))


def _chains(code: CodeType) -> Iterator[tuple[str, ...]]:
    chain: tuple[str, ...] = ()
    imported: tuple[str, ...] = ()  # and not yet stored
    local: dict[str, tuple[str, ...]] = {}  # variables that hold what was imported
    for step in dis.get_instructions(code):
        name = step.argval
        if step.opname in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "SWAP", "COPY"):
            continue
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, name)
            continue
        if chain:
            yield chain
        chain = ()
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = (name,)
        elif step.opname in _LOADS and name in local:
            chain = local[name]
        elif step.opname == "IMPORT_NAME":
            imported = (f"{IMPORT}{name}",)
            yield imported
        elif step.opname == "IMPORT_FROM":
            imported = (imported[0], name)
            yield imported
        elif step.opname in _STORES and imported:
            first = imported[0].removeprefix(IMPORT).partition(".")[0]  # import a.b gives a, unless it is given a name
            local[name] = (f"{IMPORT}{first}",) if len(imported) == 1 and name == first else imported
            imported = imported[:1] if len(imported) > 1 else ()
    if chain:
        yield chain


_LOADS = ("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_DEREF", "LOAD_CLASSDEREF")
_STORES = ("STORE_FAST", "STORE_DEREF", "STORE_GLOBAL", "STORE_NAME")
