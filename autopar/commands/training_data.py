"""What ``autopar train`` reads, of its options: tokens of a text, or the batches of a user's loader; and the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from autopar.checkpoint.weight_files import files_of
from autopar.commands.data_options import DATA, EVAL_DATA, DataChoices
from autopar.commands.options import ModelChoices
from autopar.commands.trained_model import refuse_model, refuse_without_weights
from autopar.commands.user_loaders import found_loader, stream_of
from autopar.data.batch_source import Source
from autopar.data.loader_stream import LoaderStream
from autopar.data.token_stream import TokenStream
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.pretrained.hub_models import keep_in_float32, refuse_quantised, settle_problem_type
from autopar.training.evaluation import Evaluation
from autopar.zoo.named import Example, is_users_code

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


def refuse_early(name: str, wanted: Wanted, *, random: bool) -> None:
    """Raise what ranks would raise for texts and for the model ``name``, before they are started.

    Code of the user's, a loader or a model, is left to them, and no weights are made.
    """
    source = source_of(wanted) if wanted.data.loader is None else None
    evaluation = evaluation_of(wanted) if wanted.data.eval_loader is None else None
    if source is not None and not is_users_code(name):
        model_for(name, wanted.choices, source, evaluation, random=random, outline=True)


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
    name: str,
    choices: ModelChoices,
    source: Source,
    evaluation: Evaluation | None,
    *,
    random: bool,
    shown: bool = False,
    outline: bool = False,
) -> Example:
    """The model ``name``, on the meta device where its weights are in files, or for an ``outline``.

    ``random``: whatever its folder has. ``shown``: say what it is, and which weights it starts from.
    Raises ValueError where it cannot be trained on the batches of ``source``, or evaluated, and CheckpointError for
    files that are not there, or not to be trained.
    """
    usual = replace(choices, batch=None, length=None)
    given = None if isinstance(source, TokenStream) else source.first()
    example = usual.example(name, shown=shown, given=given, start="random" if random else "files", outline=outline)
    refuse_without_weights(example, outline=outline)
    if isinstance(source, TokenStream):
        refuse_model(name, example.model, source)
    if evaluation is not None and isinstance(evaluation.source, TokenStream):
        refuse_model(name, example.model, evaluation.source)
    settle_problem_type(example.model, example.batch)
    if example.files is not None:
        files_of(example.files.folder)
        config = getattr(example.model, "config", None)
        refuse_quantised(example.files.folder, config)
        keep_in_float32(example.model, getattr(config, "dtype", None))
    return example
