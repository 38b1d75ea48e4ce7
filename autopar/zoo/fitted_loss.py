"""The loss of a model, with what a batch has for it: the model's own, or one that fits what the model returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autopar.zoo.passed_batches import Passed, passed
from autopar.zoo.put_on_loss import (
    AUTO,
    NONE,
    OF_TARGETS,
    WORDS,
    fitting_loss,
    fitting_loss_of_target,
    has_loss,
    known_loss,
    with_loss,
)
from autopar.zoo.rehearsal import rehearse


@dataclass(frozen=True)
class Fitted:
    """A model, a batch for it by name, and what a user should know about its loss, or nothing."""

    model: nn.Module
    batch: dict[str, Any]
    words: str = ""


def with_fitting_loss(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], loss: str, name: str) -> Fitted:
    """``model``, called ``name``, with the loss that ``loss`` names; ``auto``: where it returns none, one that fits.

    Raises ValueError for an unknown loss, and for a batch that is not what the model takes.
    """
    given = passed(model, batch, known_loss(loss), name)
    chosen = _fitting(model, given, name) if loss == AUTO else loss
    if chosen is None or chosen == NONE:
        return Fitted(model, given.batch)
    target = given.target
    said = f"it returns no loss: {WORDS[chosen].format(target.name if target else '')} is put on"
    return Fitted(with_loss(model, chosen, target), given.batch, said * (loss == AUTO))


def _fitting(model: nn.Module, given: Passed, name: str) -> str | None:
    """The loss that fits; None for a model that returns its own, or nothing to learn from."""
    found = rehearse(model, given.inputs)
    if given.target is not None:
        _refuse_target(name, given, found.output)
        return fitting_loss_of_target(found.output, given.value)
    if found.output is None or has_loss(found.output):
        return None
    return fitting_loss(found.output, given.inputs, found.bounds)


def _refuse_target(name: str, given: Passed, output: Any) -> None:
    """Raise ValueError where what the model does not take of a batch is no target, as far as is known."""
    if output is not None and not has_loss(output):
        return
    why = "could not be run here to see what it returns" if output is None else "returns a loss without it"
    assert given.target is not None
    raise ValueError(
        f"a batch has '{given.target.name}', which the forward of {name} does not take; the model {why}\n"
        f"Way out: a loader that leaves it out, or --loss {' or '.join(OF_TARGETS)}, which compares the output with it."
    )
