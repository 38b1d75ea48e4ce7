"""What code of users asks tensors beside values, sizes and dtype: answered as the inputs of the call would.

A graph answers once, and a call with inputs of other strides would be answered as the first. So what was asked is
written down (:mod:`autopar.ir.asked_of_inputs`), and is asked again of each call. While a model is traced fake tensors
stand for its inputs: where one of these is asked, the real one answers. Where a tensor is in memory, and what has
happened to it, is refused.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from autopar.errors import TraceError
from autopar.ir.asked_of_inputs import ANSWERS, ATTRIBUTE, STRIDES
from autopar.observation.answered_by_strides import compares_identities, is_caught
from autopar.observation.source_lines import is_users_file, line_of_user

STORED, LEAF, VIEW = STRIDES, "whether they are leaves", "whether they are views"
_OFFSET, _SHARED, _PINNED, _INFERENCE, _CONJUGATES = (
    next(name for name in ANSWERS if word in name) for word in ("offset", "shared", "pinned", "inference", "conjug")
)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_ASKS: Mapping[Any, str] = {
    Tensor.is_contiguous: STRIDES, Tensor.stride: STRIDES, Tensor.dim_order: STRIDES,
    Tensor.storage_offset: _OFFSET, Tensor._is_view: VIEW, Tensor.is_shared: _SHARED, Tensor.is_pinned: _PINNED,
    Tensor.is_inference: _INFERENCE, torch.is_inference: _INFERENCE,
    Tensor.is_conj: _CONJUGATES, torch.is_conj: _CONJUGATES, Tensor.is_neg: _CONJUGATES, torch.is_neg: _CONJUGATES,
    _getter("is_leaf"): LEAF, _getter("grad_fn"): LEAF,
}  # fmt: skip
_REFUSED: Mapping[Any, str] = {
    Tensor.data_ptr: "where a tensor is in memory (data_ptr)",
    Tensor.untyped_storage: "for the memory of a tensor (untyped_storage)",
    Tensor.storage: "for the memory of a tensor (storage)",
    _getter("_base"): "of which tensor another one is a view (_base)",
    _getter("_version"): "how often a tensor was written into (_version)",
    _getter("grad"): "for the gradient that a tensor has (grad)",
}
_MAY_FAIL, _ITSELF = (Tensor.view, Tensor.view_as), (Tensor.contiguous,)  # by strides: fail, or give what they got
_NAMES: Mapping[Any, str] = {_getter("is_leaf"): "is_leaf", _getter("grad_fn"): "grad_fn"}
WAY_OUT = "Way out: decide outside of the model, and pass what it is to do as an argument."


def asks(func: Any, args: Any, frame: FrameType | None, inputs: Mapping[int, Tensor]) -> tuple[str, Callable[..., Any]]:
    """What ``func`` asks a tensor for, if ``frame`` is a user's: the name, and what answers. Raises TraceError.

    ``inputs``: those of the call, by the addresses of what stands for them.
    """
    name = _ASKS.get(func, "")
    if func in _MAY_FAIL:
        return (STRIDES if is_caught(frame) else ""), func
    if func in _ITSELF:
        return (STRIDES if compares_identities(frame) else ""), func
    if not name and func not in _REFUSED:
        return "", func
    while frame is not None and (frame.f_code.co_name == "__torch_function__" or _is_of(func, frame)):
        frame = frame.f_back
    if frame is None or not is_users_file(frame.f_code.co_filename):
        return "", func
    if not name:
        raise TraceError(f"forward asks {_REFUSED[func]}\n  at {line_of_user(frame)}\n{WAY_OUT}")
    real = inputs.get(id(args[0])) if args else None
    return name, func if real is None else lambda _, *rest, **options: func(real, *rest, **options)


def _is_of(func: Any, frame: FrameType) -> bool:
    """Whether ``frame`` is of ``func`` itself, a Python function of torch's that asks modes before it does anything."""
    return frame.f_code in (getattr(func, "__code__", None), handle_torch_function.__code__)


def refuse_listed(code: CodeType | None, tensors: Iterable[Tensor]) -> None:
    """Raise TraceError where ``code`` lists attributes, and inputs have some that what stands for them has not."""
    put = sorted({name for tensor in tensors for name in vars(tensor)})
    if code is not None and put:
        raise TraceError(
            f"forward lists attributes (vars, dir), and '{put[0]}' was put on an input, which a program does not see\n"
            f"  in {code.co_qualname} of {Path(code.co_filename).name}:{code.co_firstlineno}\n"
            "Way out: pass it as an argument of its own."
        )


@contextmanager
def attributes_of_tensors(met: set[str], tensors: Iterable[Tensor]) -> Iterator[None]:
    """Within this context ``met`` takes the attributes that code of users looks for at tensors, and that are not there.

    Raises TraceError where one of ``tensors`` has it: what stands for these in a trace does not.
    """
    put = {name for tensor in tensors for name in getattr(tensor, "__dict__", ())}
    thread = threading.get_ident()

    def __getattr__(self: Tensor, name: str) -> Any:
        frame = sys._getframe(1)
        if threading.get_ident() == thread and name[:2] != "__" and is_users_file(frame.f_code.co_filename):
            if name in put:
                raise TraceError(
                    f"forward reads '{name}', an attribute that was put on a tensor, which a program does not see\n"
                    f"  at {line_of_user(frame)}\nWay out: pass it as an argument of its own."
                )
            met.add(ATTRIBUTE + name)
        raise AttributeError(f"'Tensor' object has no attribute '{name}'")

    with mock.patch.object(Tensor, "__getattr__", __getattr__, create=True):
        yield
