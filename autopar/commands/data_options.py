"""The options of ``autopar train`` that say what it is trained on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast, get_args

import typer

from autopar.commands.bundles import option

if TYPE_CHECKING:  # which imports torch
    from autopar.data.token_stream import Tokens

PANEL = "Data"
Documents = Literal["joined", "separate"]  # that of autopar.data.token_stream
DATA, EVAL_DATA = "--data", "--eval-data"
Data = Annotated[
    Path | None,
    typer.Option(
        DATA,
        "--text",
        metavar="PATH",
        rich_help_panel=PANEL,
        help="text, .jsonl, a folder of these; tokens: .npy, .bin, Megatron-LM's .bin and .idx; or, for any model, "
        "file.py:loader, a function that returns batches  [default: Python's own reference]",
    ),
]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", metavar="DIR", rich_help_panel=PANEL, help="of transformers, or bytes")
]
TextKey = Annotated[str, typer.Option("--text-key", rich_help_panel=PANEL, help="of the text in a line of .jsonl")]
TokenDtype = Annotated[
    str, typer.Option("--token-dtype", rich_help_panel=PANEL, help="of the numbers in .bin without .idx")
]
EndToken = Annotated[
    int | None, typer.Option("--end-token", metavar="ID", rich_help_panel=PANEL, help="ends a document in .npy, .bin")
]
DocumentsName = Annotated[
    str,
    typer.Option(
        "--documents", metavar="joined|separate", rich_help_panel=PANEL, help="separate: tokens see their own only"
    ),
]

EvalData = Annotated[
    Path | None,
    typer.Option(EVAL_DATA, metavar="PATH", rich_help_panel=PANEL, help="as --data: to evaluate the model on"),
]
EvalEvery = Annotated[
    int | None,
    typer.Option(
        "--eval-every",
        min=1,
        rich_help_panel=PANEL,
        help="steps from one evaluation to the next  [default: one at the end]",
    ),
]
EvalBatches = Annotated[
    int | None, typer.Option("--eval-batches", min=1, rich_help_panel=PANEL, help="most of an evaluation")
]


@dataclass(frozen=True)
class DataChoices:
    """Where batches come from: a loader, or tokens of a text.

    ``path``, ``eval_path``: of a text, or the name of a loader. ``tokenizer`` and those after it are of texts, as
    :func:`autopar.data.token_sources.read_tokens` takes them.
    """

    path: Path | None
    tokenizer: str | None
    text_key: str
    dtype: str
    end: int | None
    documents: Documents
    eval_path: Path | None = None
    eval_every: int | None = None
    eval_batches: int | None = None

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        return [
            option("data", Data),
            option("tokenizer", TokenizerName),
            option("text_key", TextKey, "text"),
            option("token_dtype", TokenDtype, "uint16"),
            option("end_token", EndToken),
            option("documents", DocumentsName, "joined"),
            option("eval_data", EvalData),
            option("eval_every", EvalEvery),
            option("eval_batches", EvalBatches),
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError."""
        if given["documents"] not in get_args(Documents):
            raise ValueError(f"--documents {given['documents']}: it is one of {', '.join(get_args(Documents))}")
        documents = cast("Documents", given["documents"])
        key, dtype, end = given["text_key"], given["token_dtype"], given["end_token"]
        evaluation = [given[name] for name in ("eval_data", "eval_every", "eval_batches")]
        if evaluation[0] is None and any(evaluation):
            raise ValueError("what is the model to be evaluated on?\nWay out: --eval-data PATH, or file.py:loader.")
        found = cls(given["data"], given["tokenizer"], key, dtype, end, documents, *evaluation)
        if found.loader is not None and (found.tokenizer, end, documents) != (None, None, "joined"):
            raise ValueError(
                f"--data {found.path} is a loader, and --tokenizer, --end-token and --documents are for texts\n"
                "Way out: leave them out; the loader gives what the model takes."
            )
        return found

    @property
    def loader(self) -> str | None:
        """The name of a loader; None where data are a text."""
        return _loader(self.path, DATA)

    @property
    def eval_loader(self) -> str | None:
        return _loader(self.eval_path, EVAL_DATA)

    def read(self) -> Tokens:
        """Raises ValueError for what cannot be read."""
        from autopar.data.token_sources import byte_tokens, usual_text

        return byte_tokens(usual_text()) if self.path is None else self._read(self.path)

    def read_eval(self) -> Tokens:
        """Raises ValueError for what cannot be read."""
        assert self.eval_path is not None
        return self._read(self.eval_path)

    def _read(self, path: Path) -> Tokens:
        from autopar.data.token_sources import read_tokens

        return read_tokens(path, self.tokenizer, self.text_key, self.dtype, self.end)


def _loader(path: Path | None, option: str) -> str | None:
    """``file.py:loader`` or ``package.module:loader`` as text; None for a file or folder."""
    text = "" if path is None else str(path)
    if text.endswith(".py") and path is not None and path.is_file():
        raise ValueError(f"{option} {text}: that is Python\nWay out: {text}:LOADER, its function that returns batches.")
    module, colon, name = text.rpartition(":")
    is_name = all(part.isidentifier() for part in name.split("."))
    is_python = module.endswith(".py") or all(part.isidentifier() for part in module.split("."))
    return text if colon and is_name and is_python and not Path(text).exists() else None
