"""The names that code reads, against Python's own disassembler."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import json.decoder
import logging
import re
import typing
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import torch.nn.modules.module

from autopar.observation.code_names import ATTRIBUTES, CELLS, GLOBALS, IMPORTS, PARTS, Names, functions_of, names_of


def _by_dis(code: CodeType) -> Names:
    places: tuple[set[tuple[str, tuple[str, ...]]], ...] = (set(), set())
    attributes: set[str] = set()
    imports: set[str] = set()
    words: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for number, step in enumerate(steps):
        after = itertools.takewhile(lambda each: each.opname in ATTRIBUTES, steps[number + 1 :])
        then = tuple(each.argval for each in after)
        for kinds, place in zip((GLOBALS, CELLS), places):
            if step.opname in kinds:
                place.add((step.argval, then))
        if step.opname in (*ATTRIBUTES, *PARTS, "LOAD_SUPER_ATTR"):
            attributes.add(step.argval)
        if step.opname in IMPORTS:
            imports.add(step.argval)
    for inner in (each for each in code.co_consts if isinstance(each, CodeType)):
        known = _by_dis(inner)
        places[0].update(known.globals)
        places[1].update(known.cells)
        attributes.update(known.attributes)
        imports.update(known.imports)
        words.update(known.texts)
    texts = {text for text in code.co_consts if isinstance(text, str)}
    named = {name for name, _ in places[0]} | attributes
    if named & {"getattr", "hasattr", "vars", "eval", "exec", "__dict__"}:
        attributes |= {text for text in texts if text.isidentifier()}
    if named & {"eval", "exec"}:
        words.update(*(re.findall(r"[A-Za-z_]\w*", text) for text in texts))
    elif named & {"globals", "f_globals"}:
        words |= {text for text in texts if text.isidentifier()}
    if named & {"modules", "import_module", "__import__"}:
        imports |= {text for text in texts if all(part.isidentifier() for part in text.split("."))}
        imports |= named & {"__name__"}
    globals_, cells = (tuple(sorted(place, key=str)) for place in places)
    return Names(globals_, cells, tuple(sorted(attributes)), tuple(sorted(imports)), tuple(sorted(words)))


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in vars(module).values():
        for inner in (value, *(vars(value).values() if isinstance(value, type) else ())):
            if isinstance(inner, FunctionType):
                yield inner


def test_names_are_those_that_dis_finds() -> None:
    functions = [
        function
        for module in (torch.nn.modules.module, inspect, typing, logging, json.decoder)
        for function in _functions(module)
    ]
    wide = "def wide():\n" + "".join(f"    name{number}.part{number}\n" for number in range(300))  # beyond one byte
    code = [function.__code__ for function in functions] + [compile(wide, "wide.py", "exec")]
    assert len(code) > 400
    for each in code:
        assert names_of(each) == _by_dis(each), each
    assert any(names_of(each).cells for each in code) and any(names_of(each).imports for each in code)


class Proxy:
    """Answers to every name with another one, as remote objects and mocks do."""

    def __getattr__(self, name: str) -> Proxy:
        return Proxy()


def test_functions_of_what_answers_to_every_name() -> None:
    assert list(functions_of(Proxy())) == []
    remembering = functools.cache(_by_dis)
    assert list(functions_of(remembering)) == [_by_dis]


def _inner() -> None:
    """Something to be wrapped."""


class _AnswersAll:
    def __getattr__(self, name: str) -> Any:
        return self


class _Wraps:
    def __init__(self, inner: Any) -> None:
        self.__wrapped__ = inner


class _ByClass:
    __wrapped__ = staticmethod(_inner)


@pytest.mark.parametrize(
    "value, functions",
    [
        (functools.cache(_inner), [_inner]),
        (_Wraps(_inner), [_inner]),
        (_ByClass(), [_inner]),
        (_ByClass, [_inner]),
        (type("Below", (_ByClass,), {}), [_inner]),
        (type("Made", (type,), {"__wrapped__": _inner})("OfMeta", (), {}), [_inner]),
        (_Wraps(None), []),
        (_AnswersAll(), []),
        (functools, []),
        ((1, 2), []),
        (len, []),
        (type("Slotted", (), {"__slots__": ()})(), []),
    ],
)
def test_what_a_value_wraps_is_found_as_inspect_finds_it(value: Any, functions: list[Any]) -> None:
    assert [*functions_of(value)] == functions
    assert bool(functions) == (inspect.getattr_static(value, "__wrapped__", None) is not None)


def test_what_wraps_itself_has_no_function() -> None:
    circle = _Wraps(None)
    circle.__wrapped__ = circle
    assert [*functions_of(circle)] == []
