"""The options of ``autopar train`` that say what it is trained on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, cast, get_args

import typer

from autopar.commands.bundles import option
from autopar.data.token_sources import byte_tokens, read_tokens, usual_text
from autopar.data.token_stream import Documents, Tokens

PANEL = "Data"
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        "--text",
        metavar="PATH",
        rich_help_panel=PANEL,
        help="text, .jsonl, a folder of these, or tokens: .npy, .bin, Megatron-LM's .bin and .idx  "
        "[default: Python's own reference]",
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


@dataclass(frozen=True)
class DataChoices:
    """Where tokens come from; the fields are those of :func:`autopar.data.token_sources.read_tokens`."""

    path: Path | None
    tokenizer: str | None
    text_key: str
    dtype: str
    end: int | None
    documents: Documents

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        return [
            option("data", Data),
            option("tokenizer", TokenizerName),
            option("text_key", TextKey, "text"),
            option("token_dtype", TokenDtype, "uint16"),
            option("end_token", EndToken),
            option("documents", DocumentsName, "joined"),
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError."""
        if given["documents"] not in get_args(Documents):
            raise ValueError(f"--documents {given['documents']}: it is one of {', '.join(get_args(Documents))}")
        documents = cast("Documents", given["documents"])
        key, dtype, end = given["text_key"], given["token_dtype"], given["end_token"]
        return cls(given["data"], given["tokenizer"], key, dtype, end, documents)

    def read(self) -> Tokens:
        """Raises ValueError for what cannot be read."""
        if self.path is None:
            return byte_tokens(usual_text())
        return read_tokens(self.path, self.tokenizer, self.text_key, self.dtype, self.end)
