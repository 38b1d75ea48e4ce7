"""Blocks that are alike but for what lies outside of their attributes: they are traced, or found out."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.frontend.trace import trace
from tests.frontend.test_equal_blocks import Block, Model, X, all_traced, stamped, text_of


class Config:
    scale: float = 1.0
    last: Any = None


class Configured(Block):
    """Reads what the model sets elsewhere before it calls a block."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.config: Any = None

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        return x + self.linear(x) * self.config.scale


class Telling(Configured):
    """Leaves elsewhere what it computes, and what it takes and gives."""

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        self.config.last = self.linear(x)
        FOUND.append(x)
        return x + self.config.last


FOUND: list[Tensor] = []


class Setting(Model):
    def __init__(self, block: type[Configured]) -> None:
        super().__init__(block)
        self.config = Config()
        for each in self.blocks:
            each.config = self.config  # type: ignore[assignment]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        FOUND.clear()
        x = x * self.first
        for number, block in enumerate(self.blocks):
            self.config.scale = 1.0 if number < 4 else 3.0
            x = block(x)
        x = x.sum() + sum(found.square().sum() for found in FOUND)
        if self.config.last is not None:
            x = x + self.config.last.sum()
        FOUND.clear()
        self.config.scale, self.config.last = 1.0, None
        return x


class Labelled(Block):
    def forward(self, x: Tensor, mask: Any = None) -> Any:
        x.seen = True  # type: ignore[attr-defined]
        return x + self.linear(x) * x.scale  # type: ignore[attr-defined]


class Labelling(Model):
    """Attributes on what blocks are given, of one name and several values; and such that blocks leave there."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x * self.first
        for number, block in enumerate(self.blocks):
            x.scale = 1.0 if number < 4 else 2.0  # type: ignore[attr-defined]
            y = block(x)
            x = y * 2 if hasattr(x, "seen") else y
        return x.sum()


class Doubling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


class Moded(Model):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x * self.first
        for number, block in enumerate(self.blocks):
            with Doubling() if number > 3 else nullcontext():
                x = block(x)
        return x.sum()


class Local(Block):
    """Leaves what it computes where nobody watches."""

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        OF_THREAD.last = self.linear(x)
        return x + OF_THREAD.last


OF_THREAD = threading.local()


class Threaded(Model):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x) + OF_THREAD.last.square().sum()


@pytest.mark.parametrize(
    ("model", "expected"),
    [(Setting(Configured), 2), (Setting(Telling), 0), (Labelling(Labelled), 0), (Moded(), 2), (Threaded(Local), 4)],
    ids=["set elsewhere", "left elsewhere", "on tensors", "modes", "unseen"],
)
def test_what_lies_elsewhere(model: nn.Module, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stamped(monkeypatch, model, X) == expected


class Last(Configured):
    """Is different where it is the last one, which no attribute tells."""

    def forward(self, x: Tensor, mask: Any = None) -> Any:
        return x + self.linear(x) * (3.0 if self is self.config[-1] else 1.0)


def test_blocks_that_know_themselves_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(Last)
    for block in model.blocks:
        block.config = tuple(model.blocks)  # type: ignore[assignment]
    found = text_of(trace(model, (X,)))  # compares numbers with the model
    with all_traced(monkeypatch):
        assert found == text_of(trace(model, (X,)))
