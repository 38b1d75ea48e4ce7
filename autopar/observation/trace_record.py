"""What a trace has met, so that another process can tell whether its own would come to the same program.

Guards compare by identity, which ends with a process. A record says how to find the same things again: which attributes
were read of which modules and objects, in their order; which code has run; which environment variables were read.
"""

from __future__ import annotations

import cProfile
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FrameType, MethodDescriptorType, MethodWrapperType
from types import WrapperDescriptorType as SlotType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autopar.ir.asked_of_inputs import ALL, ATTRIBUTE, STRIDES
from autopar.observation.asked_of_inputs import asks, refuse_listed
from autopar.observation.dates import refuse_dates
from autopar.observation.gradient_mode import GRADIENTS, asked_in, asks_of_tensor, taken_in
from autopar.observation.named_state import asks_for_attributes, named_in

_WITHOUT_PYTHON = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, SlotType)
OF_TORCH = ("TORCH_", "PYTORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_")  # variables that only torch and its users read
_ONLY_TORCH = ("torch.nn.functional", "torch.functional", "torch._tensor")


@dataclass(frozen=True)
class Effect:
    """A value that forward leaves: in an attribute of ``owner``, or in one of its tables (``_buffers``)."""

    owner: str
    table: str
    key: str
    value: Any


@dataclass
class TraceRecord:
    """Of one trace of a model.

    Attributes:
        asked: (address of an owner, name) of each attribute that was read, see :class:`autopar.observation.readings`.
        effects: what forward leaves in attributes.
        code: the functions that ran, those that torch's operators call inside left out.
        variables: the environment variables that were read.
        obstacle: why another process cannot find all of it again; empty if it can.
        modes: what the model has asked about the mode of its caller (:mod:`autopar.observation.gradient_mode`).
        of_inputs: what it has asked of tensors (:mod:`autopar.ir.asked_of_inputs`).
        moved: the run before, if there was one, in which forward made what it then found (a cache, a setting).
    """

    asked: list[tuple[str, str]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    code: set[CodeType] = field(default_factory=set)
    variables: set[str] = field(default_factory=set)
    modes: set[str] = field(default_factory=set)
    of_inputs: set[str] = field(default_factory=set)
    obstacle: str = ""
    moved: Moved | None = None


@dataclass(frozen=True)
class Moved:
    """The run that brought a model to rest. ``effects``: what it left; ``undone``: a context without that."""

    record: TraceRecord
    effects: list[Effect]
    undone: Callable[[], AbstractContextManager[None]]


class _Watched(TorchFunctionMode):
    """Within this context it is written down which functions run; not inside of torch's operators, for speed."""

    def __init__(self, profile: cProfile.Profile, record: TraceRecord, inputs: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._profile, self._record, self._inputs = profile, record, inputs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, _WITHOUT_PYTHON) and getattr(func, "__module__", "") not in _ONLY_TORCH:
            return func(*args, **(kwargs or {}))
        self._profile.disable()
        try:
            if asks_of_tensor(func, args, sys._getframe(1)):
                self._record.modes.add(GRADIENTS)
            asked, answer = asks(func, args, sys._getframe(1), self._inputs)
            if asked:
                self._record.of_inputs.add(asked)
            return answer(*args, **(kwargs or {}))
        finally:
            self._profile.enable()


@contextmanager
def recorded_code(record: TraceRecord, inputs: Mapping[int, Tensor]) -> Iterator[None]:
    """Add the functions that run within this context to ``record``; ``inputs``: see :func:`asks`."""
    if sys.getprofile() is not None:
        record.obstacle = "a profiler runs, and there can be only one"
        record.modes.add(GRADIENTS)  # nobody can tell
        record.of_inputs.add(STRIDES)
        yield
        return
    profile = cProfile.Profile()
    with _Watched(profile, record, inputs):
        try:
            profile.enable()
            yield
            profile.disable()
            refuse_dates(profile)
        finally:
            profile.disable()
            record.code.update(entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType))
            record.modes.update(asked_in(profile), taken_in(record.code), named_in(record.code))
            lists = asks_for_attributes(record.code)
            if lists is not None:
                record.of_inputs.add(ATTRIBUTE + ALL)
        refuse_listed(lists, inputs.values())


@contextmanager
def recorded_variables(record: TraceRecord) -> Iterator[None]:
    """Add the environment variables that are read within this context to ``record``.

    But for what torch reads of its own: it does so wherever one of its modules is loaded for the first time.
    """
    environment: Any = type(os.environ)
    get, walk, thread = environment.__getitem__, environment.__iter__, threading.get_ident()

    def read(self: Any, key: Any) -> Any:
        if threading.get_ident() == thread and not (str(key).startswith(OF_TORCH) and _is_torch(sys._getframe(1))):
            record.variables.add(str(key))
        return get(self, key)

    def all_of(self: Any) -> Any:
        if threading.get_ident() == thread:
            record.obstacle = "forward goes through all environment variables"
        return walk(self)

    with mock.patch.object(environment, "__getitem__", read), mock.patch.object(environment, "__iter__", all_of):
        yield


def _is_torch(frame: FrameType | None) -> bool:
    """Whether torch asks ``os.environ``, perhaps through ``os.getenv`` or ``Mapping.get``."""
    while frame is not None and frame.f_code.co_filename.startswith(_THROUGH):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_TORCH)


_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
_THROUGH = ("<frozen os>", "<frozen _collections_abc>", str(os.__file__), os.path.join(os.path.dirname(__file__), ""))
_RECORDS: list[list[TraceRecord]] = []


@contextmanager
def records_of_traces() -> Iterator[list[TraceRecord]]:
    """The records of the traces within this context."""
    found: list[TraceRecord] = []
    _RECORDS.append(found)
    try:
        yield found
    finally:
        with suppress(ValueError):
            _RECORDS.remove(found)


def is_recording() -> bool:
    return bool(_RECORDS)


def add_record(record: TraceRecord) -> None:
    for found in _RECORDS:
        found.append(record)
