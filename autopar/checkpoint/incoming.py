"""A checkpoint on its way into a model: in host memory until all of it has arrived, so that a load that fails changes
nothing. Each tensor is freed once the model has it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pickle import UnpicklingError
from typing import Any

from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from autopar.checkpoint.initialise import initialise
from autopar.checkpoint.named_tensors import Named, materialise, named_tensors
from autopar.checkpoint.plain_values import unpacked
from autopar.checkpoint.training_state import NewState, Owners, set_random_state
from autopar.dtensors.dtensor import local_of
from autopar.dtensors.slices import Slices
from autopar.errors import CheckpointError
from autopar.module import held_by


class Incoming:
    """What this rank takes of a checkpoint. ``targets``: flat name -> where torch puts it (None: a value).

    ``rank``: that whose random numbers and data this one continues.
    """

    def __init__(
        self, model: nn.Module, entries: Sequence[Named], owners: Owners, metadata: Metadata, rank: int, scheduler: Any
    ) -> None:
        self._model, self._entries, self._scheduler, self._rank = model, entries, scheduler, rank
        self._news = NewState(owners, metadata) if owners.optimizers else None
        values = [f"random.{rank}", f"data.{rank}", *(["scheduler"] if scheduler is not None else [])]
        self.targets: dict[str, Any] = {_key(entry): entry.slices.empty_on_cpu() for entry in entries}
        self.targets |= dict.fromkeys(values) | (self._news.targets if self._news else {})
        self._random: Mapping[str, Any] = {}
        self._before: Any = None  # the scheduler's state
        self.data: Any = None

    def prepare(self, trusted: bool) -> None:
        """Do all that can fail. Raises CheckpointError; :meth:`take_back`, where another rank does."""
        try:
            self.data = unpacked(self.targets.pop(f"data.{self._rank}"), trusted)
            self._random = unpacked(self.targets.pop(f"random.{self._rank}"), trusted)
            state = unpacked(self.targets.pop("scheduler"), trusted) if self._scheduler is not None else None
        except UnpicklingError as problem:
            raise CheckpointError(str(problem)) from None
        names = {entry.name for entry in self._entries}
        absent = [entry for entry in named_tensors(self._model) if entry.name not in names]
        initialise(self._model, [entry for entry in absent if local_of(entry.tensor).is_meta])
        if self._scheduler is not None:
            self._load_scheduler(state)

    def take_back(self) -> None:
        """Give the scheduler the state that it had; one that takes no state at all has it still."""
        if self._before is not None:
            with suppress(Exception):
                self._scheduler.load_state_dict(self._before)

    def _load_scheduler(self, state: Any) -> None:
        self._before = copy.deepcopy(self._scheduler.state_dict())
        try:
            self._scheduler.load_state_dict(state)
        except Exception as problem:  # of a class that is the user's
            raise CheckpointError(f"the scheduler does not take the state that was saved: {problem!r:.200}") from None

    def put(self, calls: int) -> None:
        """Give the model, the optimizers and the generators what has arrived. ``calls``: those of the model so far."""
        for entry in self._entries:
            materialise(self._model, [entry])
            arrived: Slices = self.targets.pop(_key(entry))
            entry.slices.local.copy_(arrived.local)
        if self._news is not None:
            self._news.targets = self.targets
            self._news.put()
        held_by(self._model).calls = calls
        set_random_state(self._random)


def _key(entry: Named) -> str:
    return f"model.{entry.name}"
