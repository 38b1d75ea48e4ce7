"""Rows of a file of tokens: each rank reads its own positions, and not a byte of the others'."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from autopar import Mesh
from autopar.data.parts import BatchesOfRank
from autopar.data.token_file import TokenFile
from autopar.errors import IndivisibleError
from tests.selection import slow_but

LENGTH, ROWS = 64, 10
MESH = Mesh(dp=2, sp=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tokens = torch.arange(LENGTH * ROWS + 5).to(torch.uint16)
    (tmp_path / "tokens.bin").write_bytes(tokens.view(torch.uint8).numpy().tobytes())
    return tmp_path / "tokens.bin"


def test_ranks_read_all_of_it_together_and_each_its_part_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []  # (first byte, bytes)
    pread = os.pread

    def counted(file: int, size: int, start: int) -> bytes:
        reads.append((start, size))
        return pread(file, size, start)

    monkeypatch.setattr(os, "pread", counted)
    of_ranks = []
    for rank in range(8):
        reads.clear()
        data = TokenFile(path, LENGTH, MESH, rank=rank)
        batches = BatchesOfRank(range(len(data)), 4, MESH, rank=rank)
        found = [batch["input_ids"] for batch in DataLoader(data, batch_sampler=batches)]
        assert [list(ids.shape) for ids in found] == [[2, LENGTH // 4]] * 2
        assert sum(size for _, size in reads) == sum(ids.numel() for ids in found) * 2  # uint16
        assert {start // 2 % LENGTH for start, _ in reads} == {rank % 4 * LENGTH // 4}
        of_ranks.append(torch.stack(found))  # (batches, rows of the rank, positions of the rank)
    whole = torch.cat([torch.cat(of_ranks[row : row + 4], 2) for row in (0, 4)], 1)
    assert torch.equal(whole.flatten(), torch.arange(8 * LENGTH))


@pytest.mark.parametrize("method", slow_but([0], ["fork", "spawn"]))
def test_with_worker_processes(path: Path, method: str) -> None:
    data = TokenFile(path, LENGTH, MESH, rank=2)
    first = data[0]["input_ids"]  # the file is open before the workers start
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method)
    found = torch.cat([batch["input_ids"] for batch in loader])
    assert torch.equal(found, torch.stack([first + row * LENGTH for row in range(ROWS)]))
    assert torch.equal(pickle.loads(pickle.dumps(data))[1]["labels"], first + LENGTH)


def test_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="645 tokens of torch.uint16, fewer than one row of 1024"):
        TokenFile(path, 1024, MESH, rank=0)
    with pytest.raises(IndivisibleError, match="30 positions does not divide into 4 parts"):
        TokenFile(path, 30, MESH, rank=0)
    with pytest.raises(IndexError):
        TokenFile(path, LENGTH, MESH, rank=0)[ROWS]
