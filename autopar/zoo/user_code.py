"""Models in a user's own Python: ``file.py:factory``, ``package.module:factory``, a class of ``nn.Module``.

Whatever that code raises is the user's to mend, so that it is told as a ValueError with the line, and never as a fault
of autopar.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from autopar.errors import near_names

SHOWN = 20  # names of a module, in a message


def is_file(path: str) -> bool:
    """Whether ``path`` is meant as a file of Python rather than as a module's name."""
    return path.endswith(".py")


def imported_file(path: str) -> ModuleType:
    """The module in a file, under the name of the file, with its folder first on the path. Raises ValueError."""
    file = Path(path)
    if not file.is_file():
        beside = (
            near_names(file.name, [entry.name for entry in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        )
        raise ValueError(f"there is no file {path}{beside}\nWay out: FILE.py:FACTORY, with the path from here.")
    working_folder_first()
    _first_on_path(str(file.resolve().parent))
    with told(f"importing {path}"):
        if file.stem in sys.modules and _is_of(sys.modules[file.stem], file):
            return sys.modules[file.stem]
        return importlib.import_module(file.stem) if _is_found(file) else _loaded(file)


def _is_of(module: ModuleType, file: Path) -> bool:
    return Path(getattr(module, "__file__", None) or "").resolve() == file.resolve()


def _is_found(file: Path) -> bool:
    """Whether ``import NAME`` finds this very file, now that its folder is the first on the path."""
    if file.stem in sys.modules or not file.stem.isidentifier():
        return False
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(file.stem)
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file.resolve()


def _loaded(file: Path) -> ModuleType:
    """The module of a file whose name is that of another module, or no name at all."""
    name = f"{file.stem} of the user"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there while it runs
    spec.loader.exec_module(module)
    return module


def imported(path: str, way_out: str) -> ModuleType:
    """The module ``path``, of the working folder first. Raises ValueError."""
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"'{path}' is no name of a model: a path of Python modules is wanted\n{way_out}")
    working_folder_first()
    try:
        with told(f"importing {path}"):
            return importlib.import_module(path)
    except ValueError as error:
        cause = error.__cause__
        absent = isinstance(cause, ModuleNotFoundError) and cause.name is not None
        if absent and f"{path}.".startswith(f"{cause.name}."):  # type: ignore[union-attr]
            raise ValueError(f"there is no model '{path}': {cause}\n{way_out}") from None
        raise


def member(module: ModuleType, target: str, presets: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable ``target`` of a module, which may be ``Class.method``. Raises ValueError with near names."""
    found: Any = module
    for part in target.split("."):
        found = getattr(found, part, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    have = sorted(presets) or makers(module)
    what = "is not callable" if found is not None else "is not there"
    raise ValueError(
        f"{module.__name__} has no '{target}' that makes a model: it {what}{near_names(target, have)}\n"
        f"Way out: one of {', '.join(have[:SHOWN]) or 'none: the module makes nothing'}."
    )


def makers(module: ModuleType) -> list[str]:
    """The names of what a module defines that can be called, in their order in the alphabet."""
    return sorted(name for name, value in vars(module).items() if _is_own(name, value, module))


def _is_own(name: str, value: Any, module: ModuleType) -> bool:
    own = getattr(value, "__module__", module.__name__) == module.__name__
    return own and callable(value) and not name.startswith("_")


def called(factory: Callable[..., Any], name: str, wanted: Mapping[str, Any]) -> Any:
    """What the factory returns with the arguments ``wanted``. Raises ValueError for one that it does not take."""
    takes = inspect.signature(factory).parameters
    for key in wanted:
        if key not in takes and not any(entry.kind is inspect.Parameter.VAR_KEYWORD for entry in takes.values()):
            raise ValueError(
                f"{name} takes no argument '{key}'{near_names(key, takes)}\nWay out: {_call_of(factory, takes)}"
            )
    missing = [
        key for key, entry in takes.items()
        if entry.default is entry.empty and key not in wanted
        and entry.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]  # fmt: skip
    if missing:
        given = " ".join(f"--config {key}=..." for key in missing)
        raise ValueError(f"{name} needs {', '.join(missing)}: {_call_of(factory, takes)}\nWay out: {given}")
    with told(f"calling {name}"):
        return factory(**wanted)


def _call_of(factory: Callable[..., Any], takes: Mapping[str, inspect.Parameter]) -> str:
    return f"{getattr(factory, '__name__', 'it')}({', '.join(map(str, takes.values()))})"


def is_module_class(factory: Any) -> bool:
    return isinstance(factory, type) and issubclass(factory, nn.Module)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turns what a user's code raises into a ValueError with its last line, and SystemExit too."""
    try:
        yield
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{what} failed: {type(error).__name__}: {said}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """The innermost line in a file that belongs to no installed package, and the way out."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"\nin {error.filename}, line {error.lineno}\nWay out: mend that line, then try again."
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_installed(frame.filename)]
    if not own:
        return "\nWay out: autopar --debug ... shows where."
    return f"\nin {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}\nWay out: mend that line, then try again."


def _is_installed(file: str) -> bool:
    python, autopar = os.path.dirname(os.__file__), str(Path(__file__).parents[1])
    return "site-packages" in file or file.startswith(("<", python, autopar))


def working_folder_first() -> None:
    _first_on_path(os.getcwd())


def _first_on_path(folder: str) -> None:
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
