"""Changes to modules of torch that most launches never import: they are made when somebody does, and at each reload."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from copy import copy
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


def when_imported(name: str, change: Callable[[Any], None]) -> None:
    """Call ``change`` with the module ``name`` each time that it has run: now, if it has, and whenever it does."""
    sys.meta_path.insert(0, _Finder(name, change))
    module = sys.modules.get(name)
    if module is not None:
        change(module)


class _Finder(MetaPathFinder):
    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change, self._own = name, change, threading.local()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name or getattr(self._own, "is_asking", False):
            return None
        self._own.is_asking = True
        try:
            spec = _found(fullname, path, target)
        finally:
            self._own.is_asking = False
        if spec is not None and spec.loader is not None:
            loader: Any = copy(spec.loader)  # which may be that of other modules too
            usual = loader.exec_module

            def exec_module(module: Any) -> None:
                usual(module)
                self._change(module)

            loader.exec_module, spec.loader = exec_module, loader
        return spec


def _found(name: str, path: Any, target: Any) -> ModuleSpec | None:
    """What the others find; not ``importlib.util.find_spec``, which at a reload gives what was found before."""
    for finder in list(sys.meta_path):
        find = getattr(finder, "find_spec", None)
        spec: ModuleSpec | None = find(name, path, target) if find is not None else None
        if spec is not None:
            return spec
    return None
