"""``--to-batch`` and ``--to-length``: batches from one size to another, for which there is one family of programs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from autopar.commands.bundles import option
from autopar.commands.options import ModelChoices

if TYPE_CHECKING:  # which import torch
    from autopar.families.family import Family
    from autopar.zoo.named import Example

PANEL = "A family of programs, for batches of many sizes"


@dataclass(frozen=True)
class BatchSizes:
    """The most rows and tokens of a family, whose least are ``--batch`` and ``--length``; None for one number alone."""

    to_batch: int | None = None
    to_length: int | None = None

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        rows = typer.Option("--to-batch", min=1, rich_help_panel=PANEL, help="most rows; the least are --batch")
        tokens = typer.Option("--to-length", min=1, rich_help_panel=PANEL, help="most tokens; the least are --length")
        return [option("to_batch", Annotated[int | None, rows]), option("to_length", Annotated[int | None, tokens])]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        return cls(**given)

    @property
    def are_several(self) -> bool:
        return self.to_batch is not None or self.to_length is not None

    def batches(self, example: Example, choices: ModelChoices, model: str, ways: int) -> list[dict[str, Any]]:
        """The batch of ``example``, then those in which one of the sizes, or both, are the most.

        Raises ValueError where the batch of the model has no such size.
        """
        found = [example.batch]
        for given in self._others(choices):
            found.append(given.example(model, ways).batch)
        for batch, name in zip(found[1:], ("--to-length" if self.to_length else "--to-batch", "--to-batch")):
            if _shapes(batch) == _shapes(example.batch):
                raise ValueError(
                    f"{name}: the batch of {model} is the same for it\n"
                    "Way out: sizes that differ from --batch and --length; or leave it out, if the model takes none."
                )
        return found

    def _others(self, choices: ModelChoices) -> Iterator[ModelChoices]:
        if self.to_length is not None:
            yield replace(choices, length=self.to_length)
        if self.to_batch is not None:
            yield replace(choices, batch=self.to_batch)
            if self.to_length is not None:
                yield replace(choices, batch=self.to_batch, length=self.to_length)


def _shapes(batch: Mapping[str, Any]) -> list[tuple[int, ...]]:
    from torch import Tensor
    from torch.utils import _pytree as pytree

    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]


def sizes_json(family: Family) -> dict[str, Any]:
    """What a family is for: ranges, the sizes that were compiled, and how many of its numbers depend on them."""
    from autopar.families.walk import numbers_of
    from autopar.ir.sizes import is_expression

    numbers = numbers_of(family.template)[0]
    return {
        "sizes": {
            name: {"least": each.least, "most": each.most, "step": each.step} for name, each in family.ranges.items()
        },
        "compiled": [dict(point) for point in family.points],
        "numbers": len(numbers),
        "expressions": sum(map(is_expression, numbers)),
    }


def sizes_text(family: Family) -> str:
    """As :func:`sizes_json`, in three lines."""
    found = sizes_json(family)
    points = "; ".join(", ".join(f"{name}={value}" for name, value in point.items()) for point in found["compiled"])
    return (
        f"a family of programs for batches of {family}\n"
        f"compiled for {points}\n"
        f"{found['expressions']} of {found['numbers']} numbers depend on these sizes"
    )
