"""Where code of users takes other ways by the strides of a tensor, and asks for none: by what fails, or by identity.

``x.view(-1)`` within ``try`` fails for some strides; ``x.contiguous() is x`` for some is true.
"""

from __future__ import annotations

import dis
from functools import cache
from types import CodeType, FrameType

from autopar.observation.source_lines import is_users_file


def is_caught(frame: FrameType | None) -> bool:
    """Whether what fails in ``frame`` is within a ``try`` of the user's function that calls there."""
    frame = _of_function(frame)
    if frame is None or not frame.f_code.co_exceptiontable or not is_users_file(frame.f_code.co_filename):
        return False
    return any(start <= frame.f_lasti < end for start, end in _tries(frame.f_code))


def compares_identities(frame: FrameType | None) -> bool:
    """Whether the user's function that calls in ``frame`` asks whether one thing is another, beside None."""
    frame = _of_function(frame)
    return frame is not None and is_users_file(frame.f_code.co_filename) and _compares(frame.f_code)


def _of_function(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame


@cache
def _tries(code: CodeType) -> tuple[tuple[int, int], ...]:
    """The instructions within ``try``; those of ``with`` keep their place for their own handlers."""
    return tuple((one.start, one.end) for one in dis.Bytecode(code).exception_entries if not one.lasti)  # type: ignore[attr-defined]


@cache
def _compares(code: CodeType) -> bool:
    steps = list(dis.get_instructions(code))
    return any(
        then.opname == "IS_OP" and not (one.opname == "LOAD_CONST" and one.argval is None)
        for one, then in zip(steps, steps[1:])
    )
