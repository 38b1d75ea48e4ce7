"""Graphs of torch without their Python, which nobody runs: export writes and compiles it anew after each of its steps.

This is the one file that knows what ``torch.fx.GraphModule.recompile`` leaves on the class that each graph module has
of its own: ``forward``, ``__call__`` and ``_wrapped_call``. The Python is made when the module is called after all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx
from torch.fx.graph import CodeGen
from torch.fx.graph_module import _WrappedCall


@contextmanager
def compiled_when_called() -> Iterator[None]:
    """Within this context, graph modules get their Python at their first call; those whose arguments are packed
    (``_PyTreeCodeGen``) at once, since torch asks for the signature of these."""
    at_once: Any = fx.GraphModule.recompile

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        at_once(module)
        return module.forward(*args, **kwargs)

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return module._wrapped_call(module, *args, **kwargs)

    def recompile(module: Any) -> Any:
        own = type(module)
        if type(module.graph._codegen) is not CodeGen or own.__bases__ != (fx.GraphModule,):
            return at_once(module)
        if "_wrapped_call" not in vars(own):
            own._wrapped_call = _WrappedCall(own, vars(own).get("__call__"))  # type: ignore[no-untyped-call]
        own.forward, own.__call__ = forward, call
        return None

    with mock.patch.object(fx.GraphModule, "recompile", recompile):
        yield
