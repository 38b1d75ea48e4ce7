"""Digests of code, equal in all processes that have loaded the same lines from the same places of their files."""

from __future__ import annotations

import hashlib
import linecache
import marshal
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

import torch

_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+")  # what may be the name of an environment variable
DIGITS = 32


def digest(*parts: str) -> str:
    """Of texts in their order; ``("ab", "c")`` and ``("a", "bc")`` differ."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:DIGITS]  # which escapes what cannot be encoded


def versions() -> tuple[str, ...]:
    """Of Python and torch, for the key of what depends on nothing else that is installed."""
    return sys.version, str(sys.implementation.cache_tag), torch.__version__, str(torch.version.git_version)


def digest_of_bytes(content: bytes | memoryview) -> str:
    """Of the data of an array."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def code_digest(code: CodeType) -> str:
    """Of what ``code`` does, of the lines on which it stands, and of the functions inside it.

    The folder of its file does not count; the text does where it has run (:func:`text_digest`).
    """
    if id(code) not in _KNOWN:
        try:
            _KNOWN[id(code)] = code, _digest_at_once(code)
        except ValueError:  # it holds what marshal writes otherwise in each process, or not at all
            _KNOWN[id(code)] = code, _digest_of_parts(code)
    return _KNOWN[id(code)][1]


_KNOWN: dict[int, tuple[CodeType, str]] = {}  # by address, kept alive: equal code may be of another file


def _digest_at_once(code: CodeType) -> str:
    """In marshal's second version equal code gives equal bytes: the later ones depend on who else has a string."""
    if _has_sets(code):
        raise ValueError("the order of a set is another in each process")
    path, name = _written(code.co_filename)
    return hashlib.sha256(name + marshal.dumps(code, 2).replace(path, b"")).hexdigest()[:DIGITS]


@cache
def _written(filename: str) -> tuple[bytes, bytes]:
    """How marshal writes the name of a file, and what stands for that: the same in every folder."""
    path = filename.encode(errors="surrogatepass")
    name = os.path.basename(filename).encode(errors="surrogatepass")
    return len(path).to_bytes(4, "little") + path, name + b"\0"


def _has_sets(code: CodeType) -> bool:
    return _have_sets(code.co_consts)


def _have_sets(constants: Any) -> bool:
    for one in constants:
        kind = type(one)
        if kind is frozenset or kind is tuple and _have_sets(one) or kind is CodeType and _has_sets(one):
            return True
    return False


def _digest_of_parts(code: CodeType) -> str:
    return digest(
        os.path.basename(code.co_filename),
        code.co_qualname,
        str(code.co_firstlineno),
        repr((code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags, code.co_names)),
        repr((code.co_varnames, code.co_freevars, code.co_cellvars, code.co_code, code.co_linetable)),
        repr(code.co_exceptiontable),
        *map(_constant, code.co_consts),
    )


def text_digest(code: CodeType) -> str:
    """Of the lines of ``code`` as they are in its file: programs quote them (``program.explain``)."""
    last = max((line for *_, line in code.co_lines() if line is not None), default=code.co_firstlineno)
    return digest(*linecache.getlines(code.co_filename)[code.co_firstlineno - 1 : last])


@cache
def _digest_of_file(path: str, *when: int) -> str:
    with open(path, "rb", buffering=0) as stream:
        return digest_of_bytes(stream.read())


def quick_text_digest(code: CodeType) -> str:
    """As :func:`text_digest`, where reading and splitting lines takes long: of all of its file, if it has one."""
    try:
        about = os.stat(code.co_filename)
        return _digest_of_file(code.co_filename, about.st_mtime_ns, about.st_size, about.st_ino)
    except (OSError, ValueError):
        return text_digest(code)


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return code_digest(value)
    if isinstance(value, tuple):
        return digest("tuple", *map(_constant, value))
    if isinstance(value, frozenset):  # another order in each process
        return digest("frozenset", *sorted(map(_constant, value)))
    return f"{type(value).__name__} {value!r}"


def inner_code(code: CodeType) -> Iterator[CodeType]:
    """``code`` and all that is written inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from inner_code(constant)


@cache
def variables_named(code: CodeType) -> frozenset[str]:
    """The texts in ``code`` that may be names of environment variables: those in capitals with an underscore."""
    texts = (text for part in inner_code(code) for text in _texts(part.co_consts))
    return frozenset(text for text in texts if _VARIABLE.fullmatch(text))


def _texts(constants: object) -> Iterator[str]:
    if isinstance(constants, str):
        yield constants
    elif isinstance(constants, (tuple, frozenset)):
        for constant in constants:
            yield from _texts(constant)
