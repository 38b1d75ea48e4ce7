"""Tasks of Hugging Face models: which class makes one, and what a batch of it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autopar.errors import near_names
from autopar.zoo import batches
from autopar.zoo.architecture import MakeBatch, transformers_library


@dataclass(frozen=True)
class Task:
    """``auto``: the class of transformers that makes a model for it; ``table``: its map of model types to classes."""

    name: str
    auto: str
    table: str
    batch: MakeBatch

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Model type -> names of classes, as transformers has them."""
        transformers_library()
        from transformers.models.auto import modeling_auto

        found = getattr(modeling_auto, self.table, {})
        return {kind: (names,) if isinstance(names, str) else tuple(names) for kind, names in found.items()}


_ENTRIES = (
    ("causal-lm", "CausalLM", "CAUSAL_LM", batches.causal),
    ("masked-lm", "MaskedLM", "MASKED_LM", batches.masked),
    ("seq2seq-lm", "Seq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", batches.pair),
    ("seq-classification", "SequenceClassification", "SEQUENCE_CLASSIFICATION", batches.sentences),
    ("token-classification", "TokenClassification", "TOKEN_CLASSIFICATION", batches.classified_tokens),
    ("question-answering", "QuestionAnswering", "QUESTION_ANSWERING", batches.spans),
    ("multiple-choice", "MultipleChoice", "MULTIPLE_CHOICE", batches.several_choices),
    ("image-classification", "ImageClassification", "IMAGE_CLASSIFICATION", batches.images),
    ("image-text-to-text", "ImageTextToText", "IMAGE_TEXT_TO_TEXT", batches.causal),
    ("image-and-text", "ZeroShotImageClassification", "ZERO_SHOT_IMAGE_CLASSIFICATION", batches.captions),
    ("speech-seq2seq", "SpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", batches.audio),
)  # fmt: skip
FEATURES = Task("features", "AutoModel", "MODEL_MAPPING_NAMES", batches.features)
TASKS: dict[str, Task] = {
    name: Task(name, f"AutoModelFor{auto}", f"MODEL_FOR_{table}_MAPPING_NAMES", batch)
    for name, auto, table, batch in _ENTRIES
} | {"features": FEATURES}
ALSO = {"sequence-classification": "seq-classification", "text-generation": "causal-lm", "fill-mask": "masked-lm"}


def task_named(name: str) -> Task:
    """Raises ValueError for an unknown one."""
    known = ALSO.get(name, name)
    if known not in TASKS:
        raise ValueError(f"--task {name}: there is none{near_names(name, TASKS)}\nWay out: one of {', '.join(TASKS)}.")
    return TASKS[known]


def task_of_class(name: str) -> Task | None:
    """The task of a class of transformers, ``LlamaForCausalLM``; None for one that is none of those above."""
    return next((task for task in TASKS.values() if any(name in names for names in task.classes.values())), None)


def tasks_of(config: Any) -> Iterator[Task]:
    """The tasks for which transformers has a class for a model of ``config``."""
    return (task for task in TASKS.values() if config.model_type in task.classes)
