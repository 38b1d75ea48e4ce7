"""A program in a directory is parsed once; what is in the directory is looked at each time."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import autopar
from autopar import Mesh, Plan
from autopar.cache import read_programs
from autopar.cache.read_programs import read_program
from autopar.compiler import compile_program
from autopar.ir.program import format_program
from autopar.program_files.program_file import load
from autopar.runtime.written_code import written
from tests.cache.test_kept import differs


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(4, width)
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x + self.table).square().mean()


def saved(folder: Path, width: int = 8) -> Path:
    compile_program(Net(width), Mesh(dp=1), Plan(seed=3), (torch.ones(2, 4),)).save(folder)
    return folder


def test_it_is_parsed_once(cache_folder: Path, tmp_path: Path) -> None:
    directory = saved(tmp_path / "program")
    first = read_program(directory, written)
    with mock.patch.object(read_programs, "parsed", side_effect=AssertionError("parsed again")):
        second = read_program(directory, written)
        model, x = Net(), torch.ones(2, 4)
        loss = model(x).item()
        module = autopar.parallelize(model, program=directory)
    plain = load(directory)
    assert differs(plain, first) == "" and differs(plain, second) == ""
    assert format_program(plain, origins=True) == format_program(second, origins=True)
    assert module(x).item() == pytest.approx(loss)


def test_another_file_is_another_program(cache_folder: Path, tmp_path: Path) -> None:
    directory = saved(tmp_path / "program")
    read_program(directory)
    saved(directory, 16)
    assert differs(load(directory), read_program(directory)) == ""
    (directory / "program.txt").write_text((directory / "program.txt").read_text().replace("16", "24"))
    with pytest.raises(autopar.ProgramFileError, match="was changed or is damaged"):
        read_program(directory)


def test_what_cannot_be_read_here_is_parsed(cache_folder: Path, tmp_path: Path) -> None:
    directory = saved(tmp_path / "program")
    read_program(directory)
    with mock.patch("autopar.cache.packing._operator", side_effect=LookupError("not registered here")):
        assert differs(load(directory), read_program(directory)) == ""


def test_without_a_cache_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE", "0")
    directory = saved(tmp_path / "program")
    assert differs(load(directory), read_program(directory)) == ""
