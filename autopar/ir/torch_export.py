"""``torch.export`` where torch was set by ``fp32_precision``, the newer name of its switch for products in TF32.

While it traces, torch's export turns the backends off, and asks for ``allow_tf32`` of cuDNN to put that back: which
torch refuses to tell where convolutions and recurrent layers differ by the newer name (torch 2.11, 2.13). What has
no answer is not put back, and was not changed. This is the one file that needs ``torch._C._get_cudnn_allow_tf32``, and
the functions behind ``fp32_precision``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

_torch: Any = torch._C
_TELLS = _torch._get_cudnn_allow_tf32
_PUT_BACK = ("cuda", "all"), ("mkldnn", "all")


def export_as_run(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, dynamic_shapes: Any = None
) -> ExportedProgram:
    """``torch.export.export`` as Python runs ``model``. Raises what forward raises, and what torch says of it."""
    with whatever_allows_tf32():
        return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False)


@contextmanager
def whatever_allows_tf32() -> Iterator[None]:
    """Within this context torch's export takes any ``fp32_precision``; what it puts back is inherited if it was."""
    before = {place: _torch._get_fp32_precision_getter(*place) for place in _PUT_BACK}
    try:
        _TELLS()
    except RuntimeError:
        _torch._get_cudnn_allow_tf32 = lambda: None
    try:
        yield
    finally:
        _torch._get_cudnn_allow_tf32 = _TELLS
        for place, was in before.items():
            _torch._set_fp32_precision_setter(*place, "none")
            if _torch._get_fp32_precision_getter(*place) != was:
                _torch._set_fp32_precision_setter(*place, was)
