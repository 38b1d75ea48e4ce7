"""Whether gradients are enabled, as a model may ask: a graph answers once, and a call without gradients asks again.

``torch.is_grad_enabled()`` says so, and ``h.requires_grad`` of what forward has computed. A model that asks is traced
in the mode of its caller, and has another program for calls in the other mode. In ``inference_mode`` nothing is traced,
so a model that asks for that mode is refused there. These functions are in C, and torch's compiler knows them: they
stay as they are, and the profiler tells who has called them. What C calls (``itertools.starmap``) it does not see: who
takes such a function as a value, in place of calling it, asks too. Other switches are told alike
(:mod:`autopar.observation.torch_switches`).
"""

from __future__ import annotations

import cProfile
import dis
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import TraceError
from autopar.ir.guards import Question
from autopar.observation.named_state import STATE
from autopar.observation.source_lines import is_users_file
from autopar.observation.torch_switches import SWITCHES, called_in_profiles, name_in_profiles, switches

GRADIENTS, INFERENCE = "is_grad_enabled", "is_inference_mode_enabled"
_CALLED = {name_in_profiles(getattr(torch, name)): name for name in (GRADIENTS, INFERENCE)} | called_in_profiles()
_OF_TENSORS = {getattr(Tensor, name).__get__ for name in ("requires_grad", "grad_fn", "is_leaf")}
_off = [False]


def asked_in(profile: cProfile.Profile) -> list[str]:
    """The modes for which functions of users have asked while ``profile`` was enabled.

    Of functions in whose midst it was enabled it does not know the callees: a call by nobody that it knows is theirs.
    """
    calls: dict[Any, int] = dict.fromkeys(_CALLED, 0)
    for entry in profile.getstats():
        if entry.code in calls:
            calls[entry.code] += entry.callcount
        is_users = isinstance(entry.code, CodeType) and _is_of_user(entry.code)
        for called in entry.calls or () if not is_users else ():
            if called.code in calls:
                calls[called.code] -= called.callcount
    return [_CALLED[name] for name, count in calls.items() if count]


def taken_in(codes: Iterable[CodeType]) -> set[str]:
    """The modes for which functions of users among ``codes`` let others ask: they load what asks, and never call it."""
    asked = (GRADIENTS, INFERENCE)
    found = set[str]()
    for code in codes:
        if any(name in code.co_names for name in asked) and _is_of_user(code):
            steps = [one for one in dis.get_instructions(code) if one.opname not in ("PUSH_NULL", "PRECALL", "CACHE")]
            pairs = zip(steps, steps[1:])
            found.update(one.argval for one, then in pairs if one.argval in asked and not _is_call(then))
    return found


def _is_call(step: dis.Instruction) -> bool:
    """Whether ``step`` calls, without arguments, what was loaded just before."""
    return step.opname == "CALL" and step.arg == 0


def asks_of_tensor(func: Any, args: Any, frame: FrameType | None) -> bool:
    """Whether code of a user's asks a tensor for what depends on the mode; ``frame``: that asks, or a mode's below."""
    if func not in _OF_TENSORS or isinstance(args[0], nn.Parameter):
        return False
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and _is_of_user(frame.f_code)


def _is_of_user(code: CodeType) -> bool:
    return is_users_file(code.co_filename) or code.co_filename == "<string>"  # by exec: nothing else of there asks


def questions_of_modes(asked: Iterable[str]) -> Iterator[Question]:
    """What each call asks again."""
    for name in sorted(set(asked)):
        if name == SWITCHES:
            yield Question(switches, switches(), name)
        elif name in STATE:
            yield Question(STATE[name], STATE[name](), name)
        elif name == GRADIENTS:
            yield Question(torch.is_grad_enabled, torch.is_grad_enabled(), f"whether gradients are enabled ({name})")
        else:
            yield Question(_not_in_inference, False, f"whether inference mode is on ({name})")


def _not_in_inference() -> bool:
    if torch.is_inference_mode_enabled():
        raise TraceError(
            f"forward asks whether inference mode is on ({INFERENCE}), and a program's answer is no: nothing is traced "
            "in that mode\n"
            "Way out: call the model under torch.no_grad() instead, or pass what it is to do as an argument."
        )
    return False


@contextmanager
def without_gradients() -> Iterator[None]:
    """Within this context a model is traced, and compared, as in ``torch.no_grad()``."""
    _off[0] = True
    try:
        with torch.no_grad():
            yield
    finally:
        _off[0] = False


def are_off() -> bool:
    return _off[0]
