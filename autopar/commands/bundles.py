"""Options that belong together: one parameter of a command that stands for many options of the command line."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol, Self, cast, runtime_checkable


@runtime_checkable
class Bundle(Protocol):
    """What a command takes as one value and a user gives as several options."""

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """The options, as keyword-only parameters that typer understands."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The value of what was given for each of the parameters. Raises ValueError."""


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with its parameters of a :class:`Bundle` type replaced by the options that these stand for.

    The result has the signature that typer reads. ``command`` is called with the bundles.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    bundles: dict[str, tuple[type[Bundle], list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if isinstance(kind, type) and isinstance(kind, Bundle):
            options = kind.parameters()
            bundles[name] = cast(type[Bundle], kind), [option.name for option in options]
            parameters += options
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def called(**given: Any) -> None:
        own = {name: kind.of({key: given.pop(key) for key in keys}) for name, (kind, keys) in bundles.items()}
        command(**given, **own)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def option(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    """A parameter of a bundle."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
