"""Models of libraries, and those that ask for switches or attributes, are compiled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.cache import compiled
from autopar.cache.compiled import cached_program
from autopar.cache.key import Request
from autopar.errors import TraceError
from autopar.zoo.named import named_model
from tests.selection import slow_but

MESH, PLAN = Mesh(dp=2), Plan(check_numerics=False)


def compiles(*requests: Request) -> list[int]:
    """How often each of ``requests`` compiled, one after the other."""
    found, usual = [], compiled.compile_program
    with mock.patch.object(compiled, "compile_program", side_effect=usual) as made:
        for one in requests:
            made.reset_mock()
            cached_program(one)
            found.append(made.call_count)
    return found


def of_library(name: str) -> Request:
    given = named_model(name)
    return Request(given.model, MESH, PLAN, (), given.batch)


@pytest.mark.parametrize("name", slow_but([0, 2], ["tiny:llama", "tiny:mixtral", "transformer", "tiny:gpt2"]))
def test_models_of_libraries(cache_folder: Path, name: str) -> None:
    pytest.importorskip("transformers")
    assert compiles(of_library(name), of_library(name)) == [1, 0]


class AsksForSwitches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.get_float32_matmul_precision() == "highest"
        return self.up(x).square().mean() * (2 if precise else 3)


class AsksForAnAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).square().mean() * (2 if hasattr(x, "lengths") else 3)


def own(kind: Callable[[], nn.Module], x: Tensor) -> Request:
    return Request(kind(), MESH, PLAN, (x,), {})


def test_another_switch_is_another_program(cache_folder: Path) -> None:
    x: Any = torch.ones(4, 4)
    backend: Any = torch.backends.cudnn
    before = backend.benchmark
    assert compiles(own(AsksForSwitches, x), own(AsksForSwitches, x)) == [1, 0]
    try:
        backend.benchmark = not before
        assert compiles(own(AsksForSwitches, x), own(AsksForSwitches, x)) == [1, 0]
    finally:
        backend.benchmark = before
    assert compiles(own(AsksForSwitches, x)) == [0]


def test_an_input_with_the_attribute_is_another_one(cache_folder: Path) -> None:
    plain, marked = torch.ones(4, 4), torch.ones(4, 4)
    vars(marked)["lengths"] = [4]
    assert compiles(own(AsksForAnAttribute, plain), own(AsksForAnAttribute, plain)) == [1, 0]
    with pytest.raises(TraceError, match="an attribute that was put on a tensor"):
        compiles(own(AsksForAnAttribute, marked))
