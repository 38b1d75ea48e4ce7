"""Where the records of steps go: lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from autopar.training.step_record import StepRecord


class Sink(Protocol):
    """Takes the record of each step."""

    def __call__(self, record: StepRecord, /) -> object: ...


class Lines:
    """A line for the first step, every ``every`` steps, those with an evaluation and the last one of ``steps``, written
    by ``write``.

    ``as_json``: lines are JSON objects.
    """

    def __init__(
        self, every: int, write: Callable[[str], object], steps: int | None = None, *, as_json: bool = False
    ) -> None:
        self._every, self._write, self._steps, self._as_json = every, write, steps, as_json
        self._began = False

    def __call__(self, record: StepRecord) -> None:
        done = record.step + 1
        if self._began and done % self._every and done != self._steps and record.evaluation_loss is None:
            return
        self._began = True
        self._write(json.dumps(record.to_json()) if self._as_json else record.line(self._steps))


class TensorBoard(AbstractContextManager["TensorBoard"]):
    """Curves for ``tensorboard --logdir DIR``. Raises ValueError where the package is missing."""

    def __init__(self, directory: Path) -> None:
        package("tensorboard", "--tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))  # type: ignore[no-untyped-call]

    def __call__(self, record: StepRecord) -> None:
        for name, number in record.numbers().items():
            self._writer.add_scalar(name, number, record.step)
        self._writer.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.close()


class Wandb(AbstractContextManager["Wandb"]):
    """A run of Weights & Biases with ``config``; ``WANDB_PROJECT`` and the like are its own settings.

    Raises ValueError where the package is missing.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._run: Any = package("wandb", "--wandb").init(config=dict(config))

    def __call__(self, record: StepRecord) -> None:
        self._run.log(record.numbers(), step=record.step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


def package(name: str, option: str) -> Any:
    """The module ``name``, which ``option`` needs. Raises ValueError where it cannot be imported."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{option} needs the package '{name}', which cannot be imported here: {error}\n"
            f"Way out: pip install {name}; or --log FILE, which writes a JSON line a step."
        ) from error
