"""Options that several commands share, and how their text becomes meshes, plans and configs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated, Any

import typer

from autopar.mesh import Mesh
from autopar.plan import Plan

_MODEL = typer.Argument(
    metavar="MODEL", help="hf:llama, hf:bert, ...; llama, models.llama:llama_70b, ...; or package.module:factory"
)
ModelName = Annotated[str, _MODEL]
OptionalModelName = Annotated[str | None, _MODEL]
MeshText = Annotated[str, typer.Option("--mesh", metavar="AXES", help="axes and sizes, e.g. dp=2,tp=2")]
PlanTexts = Annotated[
    list[str] | None,
    typer.Option("--plan", metavar="KEY=VALUE", help="a choice of the plan: sequence=megatron, tensor.*.o.weight=row"),
]
ConfigTexts = Annotated[
    list[str] | None, typer.Option("--config", metavar="KEY=VALUE", help="a field of the model's config: layers=4")
]
Batch = Annotated[int | None, typer.Option(min=1, help="rows of the example batch")]
Length = Annotated[int | None, typer.Option(min=1, help="tokens in a row")]
Seed = Annotated[int, typer.Option(help="seed of weights and batch")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text and tables")]


def read_mesh(text: str) -> Mesh:
    """``dp=2,tp=2``; ``1`` is a single device. Raises ValueError."""
    return Mesh(dp=1) if text.strip() == "1" else Mesh.parse(text)


def read_config(texts: Iterable[str] | None) -> dict[str, Any]:
    """``["layers=4", "tied=false"]`` as ``{"layers": 4, "tied": False}``. Raises ValueError."""
    return {key: _literal(text) for key, text in _pairs("--config", texts)}


def read_plan(texts: Iterable[str] | None) -> Plan:
    """The plan of ``["sequence=megatron", "tensor.*.o.weight=row"]``; choices that are tables have the form
    KEY.ENTRY=VALUE.

    Raises ValueError for a choice or a value that a plan does not have.
    """
    choices: dict[str, Any] = {}
    defaults = Plan().to_json()
    tables = [name for name, default in defaults.items() if isinstance(default, dict)]
    for key, text in _pairs("--plan", texts):
        name, dot, entry = key.partition(".")
        if (name in tables) != bool(dot):
            form = f"{name}.ENTRY=VALUE" if name in tables else f"{name}=VALUE"
            raise ValueError(f"--plan {key}={text}: this choice is written {form}; a plan has {_choices()}")
        if dot:
            choices.setdefault(name, {})[entry] = _literal(text)
        else:
            choices[name] = text if text == defaults.get(name) else _literal(text)  # "none" may be a choice's name
    try:
        return Plan.from_json(choices)
    except TypeError as error:
        raise ValueError(f"--plan: a value has the wrong type: {error}") from error


def _choices() -> str:
    return ", ".join(field.name for field in fields(Plan))


def _pairs(option: str, texts: Iterable[str] | None) -> Iterable[tuple[str, str]]:
    for text in texts or ():
        key, equals, found = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} {text}: it is not of the form key=value")
        yield key, found


def _literal(text: str) -> Any:
    """A number, true, false or none; else the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
