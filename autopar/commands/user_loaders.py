"""Loaders of a user, ``file.py:loader`` or ``package.module:loader``: found, called, and told of when they fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from autopar.data.loader_stream import END, LoaderStream, is_stateful
from autopar.data.random_numbers import seeded
from autopar.errors import near_names
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.zoo import user_code

WAY_OUT = (
    "Way out: FILE.py:FUNCTION or package.module:FUNCTION, a function that returns a DataLoader, or a list of batches."
)


def found_loader(text: str, option: str) -> Callable[..., Any] | Iterable[Any]:
    """The function, class or object that ``text`` names; nothing is called. Raises ValueError."""
    path, _, name = text.rpartition(":")
    module = user_code.imported_file(path) if user_code.is_file(path) else user_code.imported(path, WAY_OUT)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key in vars(module) if not key.startswith("_")]
            raise ValueError(f"{option} {text}: {path} has no '{name}'{near_names(name, known)}\n{WAY_OUT}")
        found = getattr(found, part)
    if not callable(found) and not isinstance(found, Iterable):
        raise ValueError(f"{option} {text}: it is {_kind(found)}, neither a function nor a loader\n{WAY_OUT}")
    return found  # type: ignore[no-any-return]


def stream_of(text: str, option: str, mesh: Mesh, plan: Plan, offered: Mapping[str, Any], seed: int) -> LoaderStream:
    """The batches of the loader that ``text`` names. ``offered``: arguments that it is given, if it takes them.

    Raises ValueError for what is no loader of batches, and with the user's own line for what fails.
    """
    found = found_loader(text, option)
    if callable(found) and not isinstance(found, (DataLoader, nn.Module)):
        found = _called(found, f"{option} {text}", {"seed": seed, "mesh": mesh, "plan": plan, **offered}, seed)
    _refuse_other(found, f"{option} {text}")
    return LoaderStream(_Told(found, text), f"{option} {text}", mesh, plan, seed)


def _called(make: Callable[..., Any], text: str, offered: Mapping[str, Any], seed: int) -> Any:
    takes = inspect.signature(make).parameters
    takes_all = any(entry.kind is entry.VAR_KEYWORD for entry in takes.values())
    missing = [
        name for name, entry in takes.items()
        if entry.default is entry.empty and name not in offered
        and entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL)
    ]  # fmt: skip
    if missing:
        raise ValueError(
            f"{text}: it needs {', '.join(missing)}; a loader may take {', '.join(offered)}\n"
            "Way out: give the others a default."
        )
    given = {name: value for name, value in offered.items() if name in takes or takes_all}
    with user_code.told(f"calling {text}"), seeded(seed):
        return make(**given)


def _refuse_other(found: Any, text: str) -> None:
    """Raise ValueError for what gives no batches."""
    if isinstance(found, Dataset) and not isinstance(found, DataLoader):
        raise ValueError(
            f"{text} gives {_kind(found)}, a data set of rows, and batches are wanted\n"
            "Way out: return DataLoader(dataset, batch_size=batch_size)."
        )
    if isinstance(found, (str, bytes, Path, Mapping)) or not isinstance(found, Iterable) and not _has_items(found):
        raise ValueError(f"{text} gives {_kind(found)}, which is no loader\n{WAY_OUT}")


def _has_items(found: Any) -> bool:
    return hasattr(type(found), "__getitem__") and hasattr(type(found), "__len__")


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


class _Told:
    """A loader; what it raises is told with the user's own line."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name
        if is_stateful(loader):
            self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self) -> Iterator[Any]:
        with user_code.told(f"reading {self._name}"):
            batches = iter(self._loader)
        return _told(batches, self._name)


def _told(batches: Iterator[Any], name: str) -> Iterator[Any]:
    while True:
        with user_code.told(f"reading {name}"):
            found = next(batches, END)
        if found is END:
            return
        yield found
