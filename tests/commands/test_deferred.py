"""Commands that are imported when they are called."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from autopar import zoo
from autopar.commands import known_names
from autopar.commands.deferred import COMMANDS
from autopar.exporters import export
from autopar.memory.optimizers import OPTIMIZERS

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


HELP = """
import sys
from autopar.commands.deferred import COMMANDS, Deferred
for name in COMMANDS:
    try:
        Deferred(name).make_context(name, ["--help"])
    except BaseException as ended:
        assert type(ended).__name__ in ("Exit", "SystemExit"), ended
    heavy = {"torch", "transformers", "numpy", "onnx"} & set(sys.modules)
    assert not heavy, (name, heavy)
"""


def test_help_of_no_command_imports_torch() -> None:
    """Seconds of a start are seconds of importing."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"Usage: {name} " in done.stdout for name in COMMANDS), done.stdout[:200]


def test_names_in_help_are_those_that_there_are() -> None:
    assert known_names.FAMILIES == zoo.FAMILIES and tuple(export.FORMATS) == known_names.FORMATS
    assert known_names.WEIGHTS == export.WEIGHTS and known_names.DIALECTS == export.DIALECTS
    assert tuple(OPTIMIZERS) == known_names.OPTIMIZERS
