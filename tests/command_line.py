"""The command line, in this process."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from autopar.__main__ import main

Outcome = tuple[int, str, str]  # exit code, stdout, stderr


def autopar(*arguments: str) -> Outcome:
    """What ``autopar *arguments`` ends with and prints."""
    before, sys.argv = sys.argv, ["autopar", *arguments]
    try:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()
