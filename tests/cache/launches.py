"""Launches of one script after the other, in one process: each imports its modules anew from their files."""

from __future__ import annotations

import importlib
import linecache
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from autopar import Mesh, Plan
from autopar.cache import compiled
from autopar.cache.compiled import cached_program
from autopar.cache.key import Request
from autopar.compiler import compile_program, split_program
from autopar.frontend.fingerprint import fingerprint
from autopar.ir.program import AnyProgram, format_program
from tests.selection import slow_but

MODEL = """
    import torch
    from torch import nn
    import parts

    class Net(parts.Base):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x):
            return parts.helper(self.finish(self.up(x))).square().mean()

    def build():
        return Net()
"""
SCRIPT = {
    "model_file.py": MODEL,
    "parts.py": """
        import torch
        from torch import nn
        import settings

        class Base(nn.Module):
            def finish(self, x):
                return x * 2

        def helper(x):
            return x + settings.SHIFT
    """,
    "settings.py": "SHIFT = 1.5\n",
}


class Launches:
    """Scripts in ``folder``, which has the files of :data:`SCRIPT` unless others are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write(**SCRIPT)

    def write(self, **files: str) -> None:
        for name, text in files.items():
            lines = text.splitlines()
            margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
            plain = "\n".join(line[margin:] for line in lines).lstrip("\n") + "\n"
            (self.folder / name).write_text(plain, encoding="utf-8")

    def edit(self, name: str, before: str, after: str) -> None:
        path = self.folder / name
        text = path.read_text(encoding="utf-8")
        assert before in text, f"{before!r} is not in {name}"
        path.write_text(text.replace(before, after), encoding="utf-8")

    @contextmanager
    def imported(self) -> Iterator[Any]:
        """The modules of a new launch; the one that has ``build``."""
        names = [path.stem for path in self.folder.glob("*.py")]
        importlib.invalidate_caches()
        linecache.checkcache()
        try:
            with mock.patch.object(sys, "path", [str(self.folder), *sys.path]):
                with mock.patch.object(sys, "dont_write_bytecode", True):
                    module = importlib.import_module("model_file")
                yield module
        finally:
            for name in names:
                sys.modules.pop(name, None)

    def launch(self, *args: Any, **choices: Any) -> Launch:
        """A new process, as far as the script can tell, that traces ``build()`` for these arguments."""
        with self.imported() as module:
            return launched(module.build(), *args, **{"compiler": traced, **choices})


class Launch:
    """Its ``program``, the ``guards``, the ``model``, and whether it ``compiled``."""

    def __init__(self, program: AnyProgram, guards: Any, model: Any, compiled: int) -> None:
        self.program, self.guards, self.model, self.compiled = program, guards, model, compiled

    @property
    def text(self) -> str:
        return text_of(self.program)


def launched(
    model: Any,
    *inputs: Any,
    mesh: Mesh | None = None,
    plan: Plan | None = None,
    kwargs: Any = None,
    compiler: Callable[..., AnyProgram] = compile_program,
) -> Launch:
    """``model`` compiled through the cache."""
    torch.manual_seed(0)
    inputs = inputs or (() if kwargs else (torch.ones(4, 4),))
    request = Request(model, mesh or Mesh(dp=2), plan or Plan(), inputs, kwargs or {})
    with mock.patch.object(compiled, "compile_program", side_effect=compiler) as counted:
        program, guards = cached_program(request)
    return Launch(program, guards, model, counted.call_count)


def text_of(program: AnyProgram) -> str:
    """All of its text, and its constants."""
    constants = {name: tensor.tolist() for name, tensor in program.constants.items()}
    return f"{format_program(program, origins=True)}\n{constants}"


def traced(
    model: Any, mesh: Mesh, plan: Plan, args: Any, kwargs: Any, layouts: Any = None, homes: Any = None, like: Any = None
) -> AnyProgram:
    """In place of the compiler: the trace, before any pass, which is a tenth of the time."""
    program = split_program(model, mesh, plan, args, kwargs, after="trace")
    return replace(program, fingerprint=fingerprint(model, args, kwargs))


@contextmanager
def said(level: int = logging.DEBUG) -> Iterator[list[str]]:
    """The messages of the package's logger."""
    messages: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("autopar"), Kept()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def some_of(fast: Sequence[str], table: Mapping[str, Any]) -> list[Any]:
    """The names of ``table`` for ``parametrize``, of which those in ``fast`` run by default."""
    names = list(table)
    return slow_but([names.index(name) for name in fast], names)
