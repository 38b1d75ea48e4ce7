"""Commands that are imported when they are called."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from autopar.commands.deferred import COMMANDS

WITHOUT_TORCH = """
import sys
sys.argv = ["autopar", *sys.argv[1:]]
from autopar.__main__ import main
try:
    main()
finally:
    assert "torch" not in sys.modules, "imported torch"
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_is_that_of_the_command(name: str) -> None:
    module, function, help_text = COMMANDS[name]
    command = getattr(importlib.import_module(f"autopar.commands.{module}"), function)
    assert help_text == " ".join((inspect.getdoc(command) or "").split("\n\n")[0].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["shw"], ["schedule", "zb-v", "--stages", "2"]])
def test_what_needs_no_torch(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert "imported torch" not in said
    assert done.returncode == (2 if arguments == ["shw"] else 0) and (arguments != ["shw"] or "'show'" in said), said
