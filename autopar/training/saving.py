"""Checkpoints of ``autopar train``: where it saves, where it resumes, and its place in the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.optim import Optimizer

from autopar.checkpoint.checkpoints import Checkpoints
from autopar.checkpoint.files import complete, path_of
from autopar.data.batch_source import Source
from autopar.module import ParallelModule
from autopar.notes import warn


@dataclass(frozen=True)
class Saving:
    """A directory that all ranks see; a checkpoint every so many steps, of which the latest ``keep`` are kept.

    ``resume``: continue from the latest one, if there is one. Raises ValueError where there are some and ``resume`` is
    not set: their steps would be done, and saved, again.
    """

    directory: Path
    every: int
    keep: int
    resume: bool

    def __post_init__(self) -> None:
        latest = self.latest
        if latest is not None and not self.resume:
            raise ValueError(
                f"--checkpoint {self.directory}: it has checkpoints, the latest of step {latest}\n"
                "Way out: --resume goes on from there; or another directory."
            )

    @property
    def latest(self) -> int | None:
        """The step of the latest complete checkpoint."""
        return max(complete(self.directory), default=None)


@dataclass(frozen=True)
class Start:
    """Steps and batches of the data that were done before, and the checkpoint that records this, if there is one."""

    step: int = 0
    batches: int = 0
    path: Path | None = None


class Saver:
    """Saves a model, its optimizer and its place in the data. All ranks call each method at the same time."""

    def __init__(self, saving: Saving, source: Source, model: ParallelModule, optimizer: Optimizer) -> None:
        self._saving, self._source, self._model, self._optimizer = saving, source, model, optimizer
        self._checkpoints = Checkpoints(saving.directory, saving.keep)
        self._saved: int | None = None

    def start(self) -> Start:
        """Load the latest checkpoint if ``resume`` is set and there is one. The model must have its program.

        Raises CheckpointError, also where another run saves there, and ValueError for a checkpoint that was made on
        other data or other batches.
        """
        self._checkpoints.claim(self._model)
        resumed = self._checkpoints.load(self._model, self._optimizer) if self._saving.resume else None
        if resumed is None:
            return Start()
        self._saved = resumed.step
        return Start(resumed.step, self._source.batches_before(resumed.data), resumed.path)

    def after(self, step: int, batches: int, finite: bool) -> None:
        """Save, if it is time, while training continues. What is not ``finite`` would push good ones out."""
        if step % self._saving.every == 0 and (finite or self._refused(step)):
            self._save(step, batches, wait=False)

    def finish(self, step: int, batches: int, finite: bool) -> Path | None:
        """Save the steps that are not saved yet, and wait until that is done; gives the last checkpoint."""
        if step != self._saved and (finite or self._refused(step)):
            self._save(step, batches, wait=True)
        self._checkpoints.wait()
        return path_of(self._saving.directory, self._saved) if self._saved is not None else None

    def _refused(self, step: int) -> bool:
        last = f"the last good one is of step {self._saved}" if self._saved is not None else "there is none yet"
        warn(
            f"step {step}: the loss, or the norm of the gradients, is not finite: no checkpoint is saved; {last}",
            stacklevel=3,
        )
        return False

    def _save(self, step: int, batches: int, wait: bool) -> None:
        place = self._source.place(batches)
        self._checkpoints.save(step, self._model, self._optimizer, data=place, wait=wait)
        self._saved = step
