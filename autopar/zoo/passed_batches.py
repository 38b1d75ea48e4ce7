"""A batch that a user's loader gives, as the arguments of a model by name; and what of it is for the loss alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from autopar.errors import near_names
from autopar.zoo.put_on_loss import AUTO, OF_TARGETS, Target

NAME = "target"  # of an entry of a tuple that the model does not take
MAY_COMPARE = (AUTO, *OF_TARGETS)


@dataclass(frozen=True)
class Passed:
    """``inputs`` of the model by name; ``target``: an entry of the batch that the model does not take, with its
    ``value``.
    """

    inputs: Mapping[str, Any]
    target: Target | None = None
    value: Any = None

    @property
    def batch(self) -> dict[str, Any]:
        """All entries, by name."""
        return {**self.inputs, **({self.target.name: self.value} if self.target is not None else {})}


def passed(model: nn.Module, batch: Mapping[str, Any] | Sequence[Any], loss: str, name: str) -> Passed:
    """``batch`` for the forward of ``model``, called ``name``. Of ``loss`` it depends whether an entry is a target:
    one that compares takes the last of a tuple, or the one that forward does not take; with ``none`` nothing is left.

    Raises ValueError, with what forward takes, for entries that it does not take and for those that it lacks.
    """
    found = _of_dict(model, batch, loss, name) if isinstance(batch, Mapping) else _of_tuple(model, batch, loss, name)
    if loss in OF_TARGETS and found.target is None:
        raise ValueError(
            f"--loss {loss} compares with an entry of the batch that the model does not take, and {name} takes all: "
            f"{', '.join(found.inputs)}\nWay out: leave out --loss, if the model returns its loss."
        )
    parameters = inspect.signature(model.forward).parameters.values()
    absent = [
        entry.name
        for entry in parameters
        if entry.default is entry.empty
        and entry.name not in found.inputs
        and entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL)
    ]
    if absent:
        raise ValueError(
            f"the forward of {name} needs {', '.join(absent)}, and a batch has {_entries(batch)}\n"
            f"Way out: a loader whose batches have what forward{inspect.signature(model.forward)} takes."
        )
    return found


def _of_dict(model: nn.Module, batch: Mapping[str, Any], loss: str, name: str) -> Passed:
    takes = inspect.signature(model.forward).parameters
    takes_all = any(entry.kind is entry.VAR_KEYWORD for entry in takes.values())
    over = [key for key in batch if key not in takes and not takes_all]
    if len(over) > (loss in MAY_COMPARE):
        raise ValueError(
            f"a batch has '{over[0]}', which the forward of {name} does not take{near_names(over[0], takes)}\n"
            f"Way out: a loader whose batches have what it takes: {', '.join(takes)}."
        )
    if not over:
        return Passed(dict(batch))
    inputs = {key: value for key, value in batch.items() if key != over[0]}
    return Passed(inputs, Target(over[0]), batch[over[0]])


def _of_tuple(model: nn.Module, batch: Sequence[Any], loss: str, name: str) -> Passed:
    takes = inspect.signature(model.forward)
    named = [p.name for p in takes.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_all = any(entry.kind is entry.VAR_POSITIONAL for entry in takes.parameters.values())
    over = 0 if takes_all else len(batch) - len(named)
    if over > (loss in MAY_COMPARE):
        raise ValueError(
            f"a batch has {_entries(batch)}, and the forward of {name} takes {len(named)}: {', '.join(named)}\n"
            "Way out: a loader whose batches are what it takes, and the target after it."
        )
    last = len(batch) - 1
    has_target = last > 0 and (over == 1 or loss in OF_TARGETS)
    names = [*named, *map(str, range(len(named), len(batch)))]
    inputs = dict(zip(names, batch[:last] if has_target else batch))
    return Passed(inputs, Target(NAME, last), batch[last]) if has_target else Passed(inputs)


def _entries(batch: Mapping[str, Any] | Sequence[Any]) -> str:
    return ", ".join(batch) if isinstance(batch, Mapping) else f"{len(batch)} entries"
