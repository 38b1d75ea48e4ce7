"""What torch is set to when a model is called, as far as a program depends on it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch

from autopar.autodiff.autograd import is_autocasting

_NO_CASTS = (None, None)


def torch_settings() -> tuple[Hashable, ...]:
    """What a trace depends on: Python may ask, what is made without a dtype has that one, and casts are nodes."""
    casts = _cast_to() if is_autocasting() else _NO_CASTS
    return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), casts


def _cast_to() -> tuple[torch.dtype | None, ...]:
    """The dtype in which autocast computes."""
    kinds = ("cpu", "cuda")
    return tuple([torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds])


@contextmanager
def outside_inference() -> Iterator[None]:
    """Within this context tensors are made that may be trained later, though the caller is in ``inference_mode``."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.set_grad_enabled(False):
        yield
