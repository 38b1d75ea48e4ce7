"""A communicator as labelled Python sees it: what runs inside a label is a range of ``torch.profiler``."""

from __future__ import annotations

from typing import Any

from torch.profiler import record_function


class Labelled:
    """``comm`` of a function that was emitted with labels; the collectives are those of ``communicator``."""

    inside = record_function

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communicator, name)
