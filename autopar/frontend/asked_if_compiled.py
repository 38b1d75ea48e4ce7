"""``torch.compiler.is_compiling()``, which is true while torch traces, and false where the model runs by itself.

Packages leave out with it what a trace cannot take (a look at values), and there it may stay true. A model that
computes something else where it is true gets the answer of a run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any
from unittest import mock

import torch

from autopar.observation.source_lines import is_users_file

_ASKS: Any = torch.compiler.is_compiling


def is_asked(code: set[CodeType]) -> bool:
    """Whether a function of users with that ``code``, which has run, may have asked."""
    return any(_ASKS.__name__ in one.co_names and is_users_file(one.co_filename) for one in code)


@contextmanager
def answered_as_in_a_run() -> Iterator[None]:
    """Within this context torch's own code, and no other, is told that it is traced."""

    def is_compiling() -> bool:
        return _ASKS() and not is_users_file(sys._getframe(1).f_code.co_filename)

    with mock.patch.object(torch.compiler, "is_compiling", is_compiling):
        yield
