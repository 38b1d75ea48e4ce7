"""Batches of a user's own data: from text, JSON lines and packed files, with documents joined or apart."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autopar import Mesh, pack_tokens
from autopar.data import token_sources
from autopar.data.megatron_index import DTYPES
from autopar.data.parts import Share
from autopar.data.token_sources import read_tokens
from autopar.data.token_stream import Tokens, TokenStream, separated


def test_documents_apart() -> None:
    batch = separated(torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 0]]), end=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[5, 6, 0, -100, 0, -100, -100], [0, -100, 2, 3, 4, 5, 0]]


def test_every_rank_sees_its_part_of_separate_documents() -> None:
    tokens = Tokens(np.random.default_rng(0).integers(0, 5, 500), 5, end=0)
    stream, mesh = TokenStream(tokens, 4, 12, "separate"), Mesh(dp=2, sp=3)
    whole = stream(7)
    assert set(whole) == {"input_ids", "labels", "position_ids"}
    parts = [stream(7, Share.of(mesh, rank)) for rank in range(6)]
    for name, tensor in whole.items():
        rows = [torch.cat([part[name] for part in parts[row : row + 3]], 1) for row in (0, 3)]
        assert torch.equal(torch.cat(rows), tensor), name


def test_documents_without_an_end() -> None:
    with pytest.raises(ValueError, match="nothing says where one ends\nWay out: --end-token"):
        TokenStream(Tokens(np.arange(100), 100), 2, 8, "separate")


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "ab", "id": 1}\n\n"c"\n{"text": "\\u00e4"}\n', encoding="utf-8")
    tokens = read_tokens(path)
    assert tokens.numbers.tolist() == [97, 98, 0, 99, 0, 0xC3, 0xA4, 0]
    assert (tokens.vocabulary, tokens.end, tokens.unit) == (256, 0, "bytes")
    path.write_text('{"body": "ab"}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=r"own.jsonl:1: no text under 'text'; it has body\nWay out: --text-key KEY"):
        read_tokens(path)
    with pytest.raises(ValueError, match=r"own.jsonl:2: no text under 'body'"):
        read_tokens(path, text_key="body")
    path.write_text('{"text": "ab"}\n{"text')
    with pytest.raises(ValueError, match=r"own.jsonl:2: no JSON"):
        read_tokens(path)


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("yy")
    (tmp_path / "a.jsonl").write_text('"x"\n')
    (tmp_path / "weights.pt").write_bytes(b"no text")
    assert bytes(read_tokens(tmp_path).numbers.tolist()) == b"x\0yy\0"
    assert bytes(read_tokens(tmp_path / "b.txt").numbers) == b"yy"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no .txt, .md, .jsonl, .ndjson file"):
        read_tokens(tmp_path / "empty")


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_packed_files_are_mapped(tmp_path: Path, dtype: str) -> None:
    numbers = np.arange(1000, dtype=dtype) % 300
    numbers.tofile(tmp_path / "own.bin")
    np.save(tmp_path / "own.npy", numbers)
    for name in ("own.bin", "own.npy"):
        tokens = read_tokens(tmp_path / name, dtype=dtype, end=0)
        assert isinstance(tokens.numbers, np.memmap) and tokens.vocabulary == 300 and tokens.end == 0
        batch = TokenStream(tokens, 2, 10)(3)
        assert batch["input_ids"].dtype == torch.int64
        assert batch["input_ids"].tolist() == [[*range(30, 40)], [(530 + i) % 300 for i in range(10)]]


def written_by_megatron(path: Path, documents: list[list[int]], dtype: str) -> None:
    """``path``.bin and .idx, as ``preprocess_data`` writes them."""
    np.concatenate([np.array(document, dtype) for document in documents]).tofile(path.with_suffix(".bin"))
    lengths, size = np.array([len(document) for document in documents], "<i4"), np.dtype(dtype).itemsize
    code = next(code for code, name in DTYPES.items() if name == dtype)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    begins = (np.cumsum(lengths) - lengths).astype("<i8") * size
    entries = np.arange(len(documents) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + begins.tobytes() + entries.tobytes())


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("name", ["own", "own.bin", "own.idx"])
def test_the_index_of_megatron_says_dtype_and_end(tmp_path: Path, name: str, dtype: str) -> None:
    written_by_megatron(tmp_path / "own", [[5, 6, 2], [7, 2], [2]], dtype)
    tokens = read_tokens(tmp_path / name)
    assert tokens.numbers.tolist() == [5, 6, 2, 7, 2, 2] and isinstance(tokens.numbers, np.memmap)
    assert (tokens.end, tokens.vocabulary) == (2, 8)
    assert read_tokens(tmp_path / name, end=7).end == 7
    written_by_megatron(tmp_path / "own", [[5, 6], [7, 2]], dtype)
    assert read_tokens(tmp_path / name).end is None, "documents end with several tokens"


def test_an_index_that_is_another(tmp_path: Path) -> None:
    written_by_megatron(tmp_path / "own", [[5, 6, 2], [7, 2]], "int32")
    index = (tmp_path / "own.idx").read_bytes()
    wrong = {
        index[:20]: "no index of Megatron-LM",
        b"x" + index[1:]: "no index of Megatron-LM",
        index[:17] + b"\x07" + index[18:]: "of whole numbers",
        index[:-8]: "2 sequences, and 74 bytes",
    }
    for data, message in wrong.items():
        (tmp_path / "own.idx").write_bytes(data)
        with pytest.raises(ValueError, match=f"own.idx: .*{message}.*\nWay out: Megatron-LM's index of own.bin"):
            read_tokens(tmp_path / "own")
    (tmp_path / "own.idx").write_bytes(index)
    with (tmp_path / "own.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="own.bin: 24 bytes, where own.idx has 20"):
        read_tokens(tmp_path / "own")


def test_files_that_are_no_tokens(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"two.npy": np.zeros((2, 2), int), "real.npy": np.zeros(3)}
    for name, numbers in wrong.items():
        np.save(tmp_path / name, numbers)
        with pytest.raises(ValueError, match=f"{name}.*tokens are whole numbers in one dim"):
            read_tokens(tmp_path / name)
    (tmp_path / "text.npy").write_text("text")
    for name in ("text.npy", "none.bin", "none.txt", "none.jsonl"):
        with pytest.raises(ValueError, match=f"--data .*{name}.*\nWay out"):
            read_tokens(tmp_path / name)


def test_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"[end]": 0, "[none]": 1, "the": 2, "cat": 3, "sat": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[none]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="[end]", unk_token="[none]").save_pretrained(folder)
    lines = [json.dumps({"text": text}) for text in ("the cat sat", "the dog")]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    tokens = read_tokens(tmp_path / "own.jsonl", str(folder))
    assert tokens.numbers.tolist() == [2, 3, 4, 0, 2, 1, 0] and (tokens.vocabulary, tokens.end) == (5, 0)
    packed = tmp_path / "own.npy"
    pack_tokens(tmp_path / "own.jsonl", packed, str(folder))
    again = read_tokens(packed, end=0)
    assert again.numbers.tolist() == tokens.numbers.tolist() and again.numbers.dtype == np.uint8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jsonl", "own.npy", "tokenizer"]
    with pytest.raises(ValueError, match="finds no tokenizer there.*\nWay out: a folder with tokenizer.json"):
        read_tokens(tmp_path / "own.jsonl", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="written to a .npy file"):
        pack_tokens(tmp_path / "own.jsonl", tmp_path / "own.bin")


def test_the_place_in_packed_tokens() -> None:
    numbers = np.arange(5_000_000, dtype=np.uint32)
    stream = TokenStream(Tokens(numbers, 5_000_000), 2, 10)
    assert stream.batches_before(stream.place(7)) == 7
    for place in (0, 2_500_000 - 2_500_000 % 4, 4_999_999):  # both ends, and a token that is looked at in between
        other = numbers.copy()
        other[place] += 1
        with pytest.raises(ValueError, match="another text, of 5,000,000 tokens"):
            TokenStream(Tokens(other, 5_000_000), 2, 10).batches_before(stream.place(7))


def test_a_token_beyond_the_vocabulary_is_told_by_every_rank_in_its_batch() -> None:
    """It lies between the ends of a packed file, which alone are looked at when it is opened."""
    numbers = np.tile(np.arange(50), 8)
    numbers[4 * 12 * 4 + 7] = 60
    stream = TokenStream(Tokens(numbers, 50, is_bounded=False), 4, 12)
    stream.limit = 50
    shares = [None, *(Share.of(Mesh(dp=2, sp=2), rank) for rank in range(4))]
    bad = next(step for step in range(12) if bool((TokenStream(stream.tokens, 4, 12)(step)["input_ids"] == 60).any()))
    for share in shares:
        for step in range(bad):
            stream(step, share)
        with pytest.raises(
            ValueError, match=f"at place 199 of the data is 60, in batch {bad + 1}; .* vocabulary of 50"
        ):
            stream(bad, share)
    stream.limit = 61
    assert len(stream(bad)["input_ids"]) == 4


def test_a_large_packed_file_is_not_all_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sources, "LOOKED_AT", 10)
    np.save(tmp_path / "own.npy", np.arange(30, dtype=np.int32))
    tokens = read_tokens(tmp_path / "own.npy")
    assert not tokens.is_bounded and tokens.vocabulary == 30
    np.save(tmp_path / "own.npy", np.arange(20, dtype=np.int32))
    assert read_tokens(tmp_path / "own.npy").is_bounded
    np.save(tmp_path / "own.npy", np.arange(-3, 20, dtype=np.int32))
    with pytest.raises(ValueError, match="it has negative numbers"):
        read_tokens(tmp_path / "own.npy")
