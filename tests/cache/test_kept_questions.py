"""What a model asks about sizes is asked once: a later launch finds it, unless the model reads something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.cache import kept_questions as kept
from autopar.cache.kept_questions import kept_questions
from autopar.cache.key import Request

LIMIT = 50


class Block(nn.Module):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.linear, self.most = nn.Linear(4, 4), most

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x * 2 if x.shape[1] % self.most == 0 else x


class Deep(nn.Module):
    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, numbers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean() * (2 if x.shape[1] > LIMIT else 1)


def asked(model: nn.Module, length: int = 40) -> list[str]:
    request = Request(model, Mesh(dp=1), Plan(), (torch.zeros(2, length, 4),), {})
    return list(map(str, kept_questions(request, [["b", "s", 4]], {"b": 2, "s": length})))


def counted() -> Any:
    return mock.patch.object(kept, "questions", side_effect=kept.questions)


def test_it_is_asked_once(cache_folder: Path) -> None:
    with counted() as questions:
        for _ in range(2):
            assert asked(Deep(7, 7, 7, 7, 7)) == ["s % 7 != 0", "s <= 50"]
        assert questions.call_count == 1
        assert asked(Deep(7, 7, 7, 7, 7), 41) == ["s % 7 != 0", "s <= 50"]
        assert questions.call_count == 2  # of another size


def test_what_is_read_is_compared(cache_folder: Path) -> None:
    """Also of a block that did not run, since it is like another."""
    asked(Deep(7, 7, 7, 7, 7))
    with counted() as questions:
        assert asked(Deep(7, 7, 7, 7, 9)) == ["s % 7 != 0", "s % 9 != 0", "s <= 50"]
        with mock.patch.dict(globals(), LIMIT=60):
            assert asked(Deep(7, 7, 7, 7, 7)) == ["s % 7 != 0", "s <= 60"]
        assert questions.call_count == 2


def test_a_damaged_file_is_made_again(cache_folder: Path) -> None:
    asked(Deep(7))
    (path,) = cache_folder.glob("*.program")
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    assert asked(Deep(7)) == ["s % 7 != 0", "s <= 50"]


def test_a_second_launch_does_not_ask(cache_folder: Path) -> None:
    found = []
    for _ in range(2):
        parallel = autopar.parallelize(Deep(7), Mesh(dp=1))
        with counted() as questions:
            for length in (8, 10, 9, 16):
                parallel(torch.zeros(4, length, 4))
        found.append((list(map(str, parallel.families)), questions.call_count))
    assert found == [(["b = 4 to 6; s = 3 to 47; s % 7 != 0"], 1), (found[0][0], 0)]
