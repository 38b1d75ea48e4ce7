"""What the Python of a model asks about sizes, and numbers that it makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from autopar.frontend import size_questions
from autopar.frontend.size_questions import questions

Act = Callable[[Tensor, int], Tensor]


class Net(nn.Module):
    def __init__(self, act: Act) -> None:
        super().__init__()
        self.table, self.out, self.act, self.calls = nn.Embedding(16, 8), nn.Linear(8, 8), act, 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.out(self.act(self.table(ids), ids.shape[1])).mean()
        return out


KINDS: dict[str, tuple[Act, list[str]]] = {  # of (4, 40) tokens
    "nothing": (lambda x, n: x.view(x.shape[0], n, 2, 4).transpose(1, 2) * n, []),
    "a multiple": (lambda x, n: x if n % 3 else x * 2, ["s % 3 != 0"]),
    "no multiple": (lambda x, n: x if n % 8 else x * 2, ["s % 8 == 0"]),
    "between": (lambda x, n: x * 2 if 60 < n < 100 else x, ["s <= 60"]),
    "equal": (lambda x, n: x * 2 if n == 40 else x, ["s == 40"]),
    "one of a list": (lambda x, n: x * 2 if n in [7, 45] else x, ["s != 7", "s != 45"]),
    "a window": (lambda x, n: x[:, : min(n, 60)], ["s <= 60"]),
    "rows and tokens": (lambda x, n: x * 2 if x.shape[0] * n > 300 else x, ["b*s <= 300"]),
    "a factor": (lambda x, n: x * (1 + (n % 3 == 0)), ["s % 3 != 0"]),
    "divided": (lambda x, n: x * 2 if divmod(n, 5)[1] == 2 else x, ["s % 5 != 2"]),
    "a power of two": (lambda x, n: x * 2 if n & (n - 1) == 0 else x, ["s & (-1 + s) != 0"]),
    "rounded": (lambda x, n: x * 2 if math.ceil(n / 16) > 4 else x, ["ceil(s/16) <= 4"]),
    "a number": (lambda x, n: x * 2 if int(n) > 50 else x, ["s == 40"]),
    "a root": (lambda x, n: x * 2 if math.sqrt(n) > 9 else x, ["s == 40"]),
    "a set": (lambda x, n: x * 2 if n in {7, 45} else x, ["s == 40"]),
    "a dict": (lambda x, n: x * {45: 2.0}.get(n, 1.0), ["s == 40"]),
    "rows": (lambda x, n: x * 2 if len(x) == 7 else x, ["b == 4"]),
    "a number, and a question": (lambda x, n: x * int(n) if n % 3 else x, ["s % 3 != 0", "s == 40"]),
}


def asked(model: nn.Module) -> list[Any]:
    return questions(model, (torch.zeros(4, 40, dtype=torch.int64),), {}, [["b", "s"]], {"b": 4, "s": 40})


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked(kind: str) -> None:
    act, expected = KINDS[kind]
    model = Net(act)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    found = asked(model)
    assert list(map(str, found)) == expected
    assert all(condition.holds({"b": 4, "s": 40}) for condition in found)
    assert model.calls == 0 and {name: id(tensor) for name, tensor in model.named_parameters()} == before


def test_sizes_of_one() -> None:
    """Torch has no symbols for them, so what is asked about them is not seen: the condition is the size."""
    model, call = Net(KINDS["rows and tokens"][0]), (torch.zeros(1, 400, dtype=torch.int64),)
    assert list(map(str, questions(model, call, {}, [["b", "s"]], {"b": 1, "s": 400}))) == ["b == 1", "s > 300"]
    assert list(map(str, questions(model, call, {}, [["b", "s"]], {"b": 1, "s": 1}))) == ["b == 1", "s == 1"]


def test_the_line_of_a_number() -> None:
    (found,) = asked(Net(KINDS["a number"][0]))
    assert "test_size_questions.py" in found.line and "int(n) > 50" in found.line


class Block(nn.Module):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.linear, self.most = nn.Linear(8, 8), most

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.linear(x))
        return x * 2 if x.shape[1] > self.most else x


class Deep(nn.Module):
    def __init__(self, limits: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, limits))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean() * (2 if x.shape[1] % 7 == 0 else 1)


def test_blocks_that_are_alike_run_once() -> None:
    model = Deep([50] * 5 + [60] + [50] * 5)
    with mock.patch.object(torch, "relu", side_effect=torch.relu) as relu:
        found = questions(model, (torch.zeros(2, 40, 8),), {}, [["b", "s", 8]], {"b": 2, "s": 40})
    assert list(map(str, found)) == ["s <= 50", "s <= 60", "s % 7 != 0"]
    assert relu.call_count == 2


class Values(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 50:
            x = x * 2
        return x * float(x.sum())


class Long(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for place in range(70):
            x = x * 2 if x.shape[1] % (100 + place) == 0 else x
        return x


def test_a_model_that_does_not_run_on_symbols() -> None:
    call = (torch.zeros(2, 40, 8),), {}, [["b", "s", 8]], {"b": 2, "s": 40}
    assert list(map(str, questions(Values(), *call))) == ["s <= 50"]  # what it asked until then
    assert questions(Long(), *call) == []  # more than is kept


def test_torch_has_what_is_replaced() -> None:
    assert torch.compiler._is_exporting_flag is False and torch.compiler._is_compiling_flag is False
    with size_questions._as_exported():
        assert torch.compiler.is_exporting() and torch.compiler.is_compiling()  # type: ignore[no-untyped-call]
    for name in ("__int__", "__index__", "__hash__", "__bool__"):
        assert name in vars(torch.SymInt), f"torch.SymInt has no {name} any more"
    assert "__bool__" in vars(torch.SymBool)
