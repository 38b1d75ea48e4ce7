"""Changes to modules of torch that most launches never import: they are made when somebody does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any


def when_imported(name: str, change: Callable[[Any], None]) -> None:
    """Call ``change`` with the module ``name``, now or once it is imported."""
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, _Finder(name, change))
    else:
        change(module)


class _Finder(MetaPathFinder):
    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            usual = loader.exec_module

            def exec_module(module: Any) -> None:
                usual(module)
                self._change(module)

            loader.exec_module = exec_module
        return spec
