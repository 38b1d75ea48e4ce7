"""Tokens of a user's own data: text, JSON lines, and files of tokens that were packed before.

| file | what it is |
|---|---|
| ``.jsonl``, ``.ndjson`` | a document on each line: an object with its text under a key, or a string |
| ``.npy`` | tokens, in one dim, as numpy writes them |
| ``.bin`` | tokens, as whole numbers one after the other, without a head (Megatron-LM's and nanoGPT's ``.bin``) |
| ``.idx`` beside a ``.bin`` | Megatron-LM's index: the dtype of the tokens, and the token that ends a document |
| a folder | all of its ``.txt``, ``.md``, ``.jsonl`` and ``.ndjson`` files by name, each text file a document |
| any other | text, one document |

Text becomes tokens by a folder of a tokenizer of ``transformers``, or by its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autopar.data.megatron_index import index_of
from autopar.data.token_stream import Tokens

BYTES = 256  # how many tokens there are where each byte is one
END_OF_BYTES = 0
JSON_LINES, TEXTS = (".jsonl", ".ndjson"), (".txt", ".md")
LOOKED_AT = 1 << 24  # tokens at each end of a packed file whose largest is taken


@dataclass(frozen=True)
class Tokenizer:
    """Text to tokens. ``end``: the token after a document."""

    encode: Callable[[str], list[int]]
    vocabulary: int
    end: int
    unit: str


def byte_tokenizer() -> Tokenizer:
    """Each byte of UTF-8 is a token; 0 ends a document."""
    return Tokenizer(lambda text: list(text.encode()), BYTES, END_OF_BYTES, "bytes")


def tokenizer_of(name: str | None) -> Tokenizer:
    """Of a folder of ``transformers``, or an id in its cache; None or ``bytes`` for bytes. Raises ValueError."""
    if name is None or name == "bytes":
        return byte_tokenizer()
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"--tokenizer {name} needs transformers: {error}\nWay out: pip install transformers."
        ) from error
    try:
        found: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--tokenizer {name}: transformers finds no tokenizer there: {reason}\n"
            "Way out: a folder with tokenizer.json and tokenizer_config.json; or --tokenizer bytes."
        ) from error
    if found.eos_token_id is None:
        raise ValueError(f"--tokenizer {name}: it has no token that ends a text (eos_token)")
    return Tokenizer(
        lambda text: found.encode(text, add_special_tokens=False), len(found), int(found.eos_token_id), "tokens"
    )


def read_tokens(
    path: Path, tokenizer: str | None = None, text_key: str = "text", dtype: str = "uint16", end: int | None = None
) -> Tokens:
    """The tokens of a file or folder (see above). Packed files are mapped into memory, not read.

    Args:
        text_key: of the text in an object of JSON lines.
        dtype: of the numbers in a ``.bin`` file without an index.
        end: the token that ends a document of a packed file; by default, that of its index.

    Raises ValueError, naming the file and the line, for what cannot be read.
    """
    path = _with_suffix(path)
    if path.suffix in (".npy", ".bin"):
        return _packed(path, dtype, end)
    words = tokenizer_of(tokenizer)
    if path.is_file() and path.suffix not in JSON_LINES and words.unit == "bytes":
        return byte_tokens(_bytes(path))
    numbers: list[int] = []
    for document in _documents(path, text_key):
        numbers += words.encode(document)
        numbers.append(words.end)
    return Tokens(np.array(numbers, dtype=np.int32), words.vocabulary, words.end, words.unit)


def pack_tokens(source: str | Path, target: str | Path, tokenizer: str | None = None, text_key: str = "text") -> Tokens:
    """Write the tokens of ``source``, read as :func:`read_tokens` does, to ``target``, a ``.npy`` file.

    Ranks map such a file into memory; text they all read and make tokens of. Raises ValueError.
    """
    tokens, path = read_tokens(Path(source), tokenizer, text_key), Path(target)
    if path.suffix != ".npy":
        raise ValueError(f"'{path}': tokens are written to a .npy file\nWay out: '{path.with_suffix('.npy')}'.")
    smallest = next(kind for kind in (np.uint8, np.uint16, np.uint32) if tokens.vocabulary <= np.iinfo(kind).max + 1)
    draft = path.with_name(f".{path.name}.draft.npy")
    try:
        np.save(draft, tokens.numbers.astype(smallest), allow_pickle=False)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return tokens


def byte_tokens(text: bytes) -> Tokens:
    """Of a text whose bytes are its tokens; a 0 in it ends a document."""
    return Tokens(np.frombuffer(text, dtype=np.uint8), BYTES, END_OF_BYTES, "bytes")


def usual_text() -> bytes:
    """The language reference that every Python carries for its ``help()``."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()


def _with_suffix(path: Path) -> Path:
    """``path``; the ``.bin`` file where it is the prefix of Megatron-LM's two files, or its index."""
    tokens = path.with_suffix(".bin") if path.suffix == ".idx" else path.with_name(f"{path.name}.bin")
    return tokens if tokens.is_file() and (path.suffix == ".idx" or not path.exists()) else path


def _packed(path: Path, dtype: str, end: int | None) -> Tokens:
    index = index_of(path) if path.suffix == ".bin" else None
    dtype = index.dtype if index is not None else dtype
    try:
        if path.suffix == ".npy":
            numbers = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            kind = np.dtype(dtype)
            numbers = np.memmap(path, dtype=kind, mode="r", shape=(path.stat().st_size // kind.itemsize,))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--data {path}: no file of tokens: {error}\nWay out: --token-dtype, for .bin.") from error
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"--data {path}: it has {numbers.dtype} in shape {list(numbers.shape)}; tokens are whole numbers in one dim"
        )
    if index is not None and end is None:
        end = index.end_token(numbers)
    ends = (numbers[:LOOKED_AT], numbers[-LOOKED_AT:])
    most = max((int(part.max()) for part in ends if len(part)), default=0)
    if any(len(part) and int(part.min()) < 0 for part in ends):
        raise ValueError(f"--data {path}: it has negative numbers, which are no tokens\nWay out: --token-dtype uint16.")
    return Tokens(numbers, most + 1, end, is_bounded=len(numbers) <= 2 * LOOKED_AT)


def _documents(path: Path, text_key: str) -> Iterator[str]:
    for file in _files(path):
        if file.suffix in JSON_LINES:
            yield from _lines(file, text_key)
        else:
            yield _bytes(file).decode(errors="replace")


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return (path,)
    found = sorted(file for file in path.rglob("*") if file.suffix in (*JSON_LINES, *TEXTS))
    if not found:
        kinds = ", ".join((*TEXTS, *JSON_LINES))
        raise ValueError(f"--data {path}: the folder has no {kinds} file\nWay out: name a file.")
    return found


def _lines(path: Path, text_key: str) -> Iterator[str]:
    for number, line in enumerate(_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--data {path}:{number}: no JSON: {error}") from error
        text = entry.get(text_key) if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            known = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(
                f"--data {path}:{number}: no text under '{text_key}'; it has {known}\nWay out: --text-key KEY."
            )
        yield text


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"--data {path}: {error.strerror}\nWay out: a file or folder that can be read.") from error
