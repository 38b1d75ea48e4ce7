"""Options that several commands share, and how their text becomes meshes, configs and models."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from autopar.commands.bundles import option
from autopar.commands.literals import pairs
from autopar.mesh import Mesh

if TYPE_CHECKING:
    from autopar.zoo.named import Example

_MODEL = typer.Argument(
    metavar="MODEL", help="hf:llama, hf:bert, ...; llama, models.llama:llama_70b, ...; or package.module:factory"
)
ModelName = Annotated[str, _MODEL]
OptionalModelName = Annotated[str | None, _MODEL]
MeshText = Annotated[str, typer.Option("--mesh", metavar="AXES", help="axes and sizes, e.g. dp=2,tp=2")]
ConfigTexts = Annotated[
    list[str] | None, typer.Option("--config", metavar="KEY=VALUE", help="a field of the model's config: layers=4")
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="rows of the batch")]
Length = Annotated[int | None, typer.Option("--length", min=1, help="tokens in a row")]
Seed = Annotated[int, typer.Option("--seed", help="seed of weights and batch")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text and tables")]


@dataclass(frozen=True)
class ModelChoices:
    """How a MODEL and its example batch are made.

    ``config``: fields of its config that are changed. ``batch``, ``length``: rows and tokens of the example batch; None
    for the usual numbers. ``seed``: of the weights and the batch.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    length: int | None = None
    seed: int = 0

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        return [
            option("model_config", ConfigTexts),
            option("model_batch", Batch),
            option("model_length", Length),
            option("model_seed", Seed, 0),
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError for a text of another form."""
        own = {name.removeprefix("model_"): value for name, value in given.items()}
        return cls(**{**own, "config": read_config(own["config"])})

    def example(self, name: str, ways: int = 1) -> Example:
        """The model ``name`` and a batch whose rows ``ways`` ranks can share. Raises ValueError."""
        from autopar.zoo.named import named_model  # which imports torch

        return named_model(name, self.config, self.batch, self.length, self.seed, ways)


def read_mesh(text: str) -> Mesh:
    """``dp=2,tp=2``; ``1`` is a single device. Raises ValueError."""
    return Mesh(dp=1) if text.strip() == "1" else Mesh.parse(text)


def read_config(texts: Iterable[str] | None) -> dict[str, Any]:
    """``["layers=4", "tied=false"]`` as ``{"layers": 4, "tied": False}``. Raises ValueError."""
    return pairs("--config", texts)
