"""torch's ONNX exporter without its notes, and the reason in its errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_notes() -> Iterator[None]:
    """Within this context it does not note packages that it does not find, nor models that are in training mode."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def reason_of(error: BaseException) -> str:
    """A line of what was first in the way."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
