"""Graphs of torch without their Python, which nobody runs: export writes and compiles it anew after each of its steps.

This is the one file that knows what ``torch.fx.GraphModule.recompile`` leaves on a graph module, ``_code`` and what
belongs to it, and on the class that each has of its own: ``forward``, ``__call__`` and ``_wrapped_call``. The Python is
made when the module is called, or its code is read, after all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx
from torch.fx.graph import CodeGen
from torch.fx.graph_module import _WrappedCall

_LEFT = ("_code", "_lineno_map", "_prologue_start")


class _Later:
    """What ``recompile`` leaves on a module, made when it is asked for: on the class, behind the module's own."""

    def __init__(self, name: str, recompile: Any) -> None:
        self.name, self.recompile = name, recompile

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            raise AttributeError(self.name)
        self.recompile(module)
        return getattr(module, self.name)


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """Within this context, graph modules get their Python when they are first called or their code is read; those whose
    arguments are packed (``_PyTreeCodeGen``) at once, since torch asks for the signature of these."""
    at_once: Any = fx.GraphModule.recompile

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        own: Any = type(module)
        if own.forward is forward:  # else somebody has kept this one since before the first call
            at_once(module)
        return own.forward(module, *args, **kwargs)  # the module may have another, which calls this one

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._wrapped_call(module, *args, **kwargs)

    def recompile(module: Any) -> Any:
        own = type(module)
        if type(module.graph._codegen) is not CodeGen or own.__bases__ != (fx.GraphModule,):
            return at_once(module)
        if "_wrapped_call" not in vars(own):
            own._wrapped_call = _WrappedCall(own, vars(own).get("__call__"))  # type: ignore[no-untyped-call]
        own.forward, own.__call__ = forward, call
        for name in _LEFT:
            vars(module).pop(name, None)  # of the graph as it was before
            setattr(own, name, _Later(name, at_once))
        return None

    with mock.patch.object(fx.GraphModule, "recompile", recompile):
        yield
