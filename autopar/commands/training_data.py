"""What ``autopar train`` reads, of its options: tokens of a text, or the batches of a user's loader; and the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autopar.commands.data_options import DATA, EVAL_DATA, DataChoices
from autopar.commands.options import ModelChoices
from autopar.commands.trained_model import refuse_model, refuse_without_weights
from autopar.commands.user_loaders import found_loader, stream_of
from autopar.data.batch_source import Source
from autopar.data.loader_stream import LoaderStream
from autopar.data.token_stream import TokenStream
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.training.evaluation import Evaluation
from autopar.zoo.named import Example

TRAIN, EVAL = "train", "eval"  # the splits that a loader may be asked for


@dataclass(frozen=True)
class Wanted:
    """What batches are to be made of, and for which mesh and plan. ``rows``, ``length``: of a whole batch of text."""

    data: DataChoices
    mesh: Mesh
    plan: Plan
    rows: int
    length: int
    choices: ModelChoices

    def stream(self, loader: str, option: str, split: str) -> LoaderStream:
        """The batches of the loader that ``option`` names. Raises ValueError."""
        offered: dict[str, Any] = {"batch_size": self.rows, "batch": self.rows, "split": split}
        if self.choices.length is not None:
            offered["length"] = self.choices.length
        return stream_of(loader, option, self.mesh, self.plan, offered, self.choices.seed)


def refuse_data(data: DataChoices) -> None:
    """Raise ValueError for a loader that is not there: before any rank is started, and without calling it."""
    for text, option in ((data.loader, DATA), (data.eval_loader, EVAL_DATA)):
        if text is not None:
            found_loader(text, option)


def refuse_texts(wanted: Wanted) -> None:
    """Raise ValueError for texts that cannot be read, before ranks are started."""
    if wanted.data.loader is None:
        source_of(wanted)
    if wanted.data.eval_loader is None:
        evaluation_of(wanted)


def source_of(wanted: Wanted) -> TokenStream | LoaderStream:
    """Raises ValueError for what cannot be read."""
    data = wanted.data
    if data.loader is None:
        return TokenStream(data.read(), wanted.rows, wanted.length, data.documents)
    return wanted.stream(data.loader, DATA, TRAIN)


def evaluation_of(wanted: Wanted) -> Evaluation | None:
    """What ``--eval-data`` says. Raises ValueError for what cannot be read."""
    data = wanted.data
    if data.eval_path is None:
        return None
    source: Source
    if data.eval_loader is None:
        source = TokenStream(data.read_eval(), wanted.rows, wanted.length, data.documents)
    else:
        source = wanted.stream(data.eval_loader, EVAL_DATA, EVAL)
    return Evaluation(source, data.eval_every, data.eval_batches)


def model_for(
    name: str, choices: ModelChoices, source: Source, evaluation: Evaluation | None, *, shown: bool
) -> Example:
    """The model ``name``. Raises ValueError where it cannot be trained on the batches of ``source``, or evaluated."""
    usual = replace(choices, batch=None, length=None)
    if isinstance(source, TokenStream):
        example = usual.example(name, shown=shown)
        refuse_model(name, example.model, source)
    else:
        example = usual.example(name, shown=shown, given=source.first())
        refuse_without_weights(name, example.model)
    if evaluation is not None and isinstance(evaluation.source, TokenStream):
        refuse_model(name, example.model, evaluation.source)
    return example
