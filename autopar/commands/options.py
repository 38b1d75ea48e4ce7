"""Options that several commands share, and how their text becomes meshes, configs and models."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from autopar.commands.bundles import option
from autopar.commands.literals import pairs
from autopar.mesh import Mesh

if TYPE_CHECKING:
    from autopar.zoo.named import Example, Start

_MODEL = typer.Argument(
    metavar="MODEL",
    help="tiny:llama, ... (small, random); llama, llama:llama_70b, ... (ours); a folder with config.json; an "
    "id in the cache of the Hugging Face Hub; file.py:factory; package.module:factory, which may be a class",
)
PANEL = "The model and its example batch"
ModelName = Annotated[str, _MODEL]
OptionalModelName = Annotated[str | None, _MODEL]
MeshText = Annotated[str, typer.Option("--mesh", metavar="AXES", help="axes and sizes, e.g. dp=2,tp=2")]
ConfigTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="KEY=VALUE",
        rich_help_panel=PANEL,
        help="a field of the model's config, or an argument of the factory: layers=4",
    ),
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, rich_help_panel=PANEL, help="rows of the batch")]
Length = Annotated[int | None, typer.Option("--length", min=1, rich_help_panel=PANEL, help="tokens in a row")]
Seed = Annotated[int, typer.Option("--seed", rich_help_panel=PANEL, help="seed of weights and batch")]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", rich_help_panel=PANEL, help="of a folder or id: causal-lm, masked-lm, ..."),
]
InputTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=SHAPE:DTYPE",
        rich_help_panel=PANEL,
        help="an argument of forward: x=4x8, ids=BxT:int64 (B rows, T tokens), steps=4:int64:0..999, flag=true",
    ),
]
Vocabulary = Annotated[
    int | None,
    typer.Option(
        "--vocab", min=1, rich_help_panel=PANEL,
        help="integers of --input are below it  [default: the sizes of the tables that they index]",
    ),
]  # fmt: skip
Loss = Annotated[
    str,
    typer.Option(
        "--loss", metavar="NAME", rich_help_panel=PANEL,
        help="of a model that returns none: next-token, mean-square, none; or with a target that it does not take: "
        "cross-entropy, squared-error; auto takes what fits",
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="print one JSON document instead of text and tables")]


@dataclass(frozen=True)
class ModelChoices:
    """How a MODEL and its example batch are made.

    ``config``: fields of its config that are changed. ``batch``, ``length``: rows and tokens of the example batch;
    None for the usual numbers. ``seed``: of the weights and the batch. The others are fields of ``Wanted``.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    length: int | None = None
    seed: int = 0
    task: str | None = None
    inputs: Sequence[str] = ()
    vocab: int | None = None
    loss: str = "auto"

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        return [
            option("model_config", ConfigTexts),
            option("model_batch", Batch),
            option("model_length", Length),
            option("model_seed", Seed, 0),
            option("model_task", Task),
            option("model_inputs", InputTexts),
            option("model_vocab", Vocabulary),
            option("model_loss", Loss, "auto"),
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError for a text of another form."""
        own = {name.removeprefix("model_"): value for name, value in given.items()}
        return cls(**{**own, "config": read_config(own["config"]), "inputs": tuple(own["inputs"] or ())})

    def example(
        self,
        name: str,
        ways: int = 1,
        *,
        shown: bool = False,
        given: Mapping[str, Any] | Sequence[Any] | None = None,
        start: Start = "usual",
        outline: bool = False,
    ) -> Example:
        """The model ``name`` and a batch whose rows ``ways`` ranks can share, or ``given``, a batch. Raises ValueError.

        ``shown``: what a user should know about the model is printed first, on stdout. ``start``, ``outline``: as of
        ``autopar.zoo.named.Wanted``.
        """
        from autopar.zoo.named import named_model  # which imports torch

        more: dict[str, Any] = {"task": self.task, "inputs": self.inputs, "vocab": self.vocab, "loss": self.loss}
        more |= {"given": given, "start": start, "outline": outline}
        found = named_model(name, self.config, self.batch, self.length, self.seed, ways, **more)
        if shown and found.words:
            print(f"{name}: {found.words}", flush=True)
        return found


def read_mesh(text: str) -> Mesh:
    """``dp=2,tp=2``; ``1`` is a single device. Raises ValueError."""
    return Mesh(dp=1) if text.strip() == "1" else Mesh.parse(text)


def read_config(texts: Iterable[str] | None) -> dict[str, Any]:
    """``["layers=4", "tied=false"]`` as ``{"layers": 4, "tied": False}``. Raises ValueError."""
    return pairs("--config", texts)
