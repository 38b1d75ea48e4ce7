"""Warnings that all ranks would give alike, since they compile the same program: the first rank alone gives them, once.

Python itself shows a warning once for each line that gives it, until a filter changes anywhere: what torch does while
it traces makes it forget. So what was said is kept here.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_said: set[str] = set()
_LISTENING: list[list[str]] = []


@contextmanager
def heard() -> Iterator[list[str]]:
    """The messages of all warnings within this context, whether or not somebody sees them."""
    messages: list[str] = []
    _LISTENING.append(messages)
    try:
        yield messages
    finally:
        _LISTENING.pop()


def is_mute() -> bool:
    """Whether another process says what this one would. Imports nothing, as this may be asked before torch is there."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank()) != 0
    return os.environ.get("RANK", "0") != "0"


LOG = "AUTOPAR_LOG"


def start_log() -> None:
    """Print what is logged to stderr, from the level on that ``AUTOPAR_LOG`` names (debug, info); once in a process."""
    level = getattr(logging, os.environ.get(LOG, "").upper(), None)
    logger = logging.getLogger("autopar")
    if not isinstance(level, int) or any(handler.name == LOG for handler in logger.handlers):
        return
    handler = logging.StreamHandler()
    handler.name = LOG
    rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    handler.setFormatter(logging.Formatter(f"autopar{rank}: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)


def warn(message: str, stacklevel: int = 2) -> None:
    """As ``warnings.warn``, on the first rank, and once for each message unless a filter says ``always``."""
    for messages in _LISTENING:
        messages.append(message)
    if is_mute():
        return
    if _action(message) not in ("always", "error"):
        if message in _said:
            return
        _said.add(message)
    warnings.warn(message, stacklevel=stacklevel + 1)


def _action(message: str) -> str:
    """What the filters of this process do with a ``UserWarning`` from any module."""
    for action, pattern, category, module, line in warnings.filters:
        matches = pattern is None or (pattern.match(message) if hasattr(pattern, "match") else pattern == message)
        if issubclass(UserWarning, category) and matches and module is None and not line:
            return action
    return "default"
