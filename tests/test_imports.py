"""What an import does: nothing to the process that imports. Hooks and filters are set when a run starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.selection import slow_but

ROOT = Path(__file__).parents[1]

WATCH = """
import atexit, signal, sys, warnings
import importlib, pathlib
import torch, numpy, typer, rich.console, networkx, safetensors.torch, torch.distributed.checkpoint
import torch.distributed.tensor, torch.distributed.tensor.debug, torch.fx, torch.export, torch._functorch.aot_autograd
import torch.distributed.checkpoint.state_dict_saver, torch._functorch.partitioners, torch.distributed.device_mesh
import onnx, onnx_ir, onnxruntime, transformers

def state():
    return {
        "sys.excepthook": sys.excepthook,
        "atexit": atexit._ncallbacks(),
        "warnings.filters": list(warnings.filters),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
    }

def changed(before):
    return ", ".join(name for name, found in state().items() if found != before[name])
"""
ALL = """
names = []
for path in sorted(pathlib.Path("autopar").glob("**/*.py")) + sorted(pathlib.Path("passes").glob("*.py")):
    parts = path.with_suffix("").parts
    parts = ("autopar", *parts) if parts[0] == "passes" else parts
    if parts[-1] != "__main__":
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
before, found = state(), []
for name in names:
    importlib.import_module(name)
    if what := changed(before):
        found.append(f"{name}: {what}")
        before = state()
print(len(names), *found, sep="\\n")
"""
CONNECT = """
from autopar.runtime.connect import connect
from autopar.mesh import Mesh
before = state()
connect(Mesh(), 10.0, torch.device("cpu"))
first, before = changed(before), state()
connect(Mesh(), 10.0, torch.device("cpu"))
print(first or "nothing", changed(before) or "nothing", sep="\\n")
"""


def lines_of(script: str) -> list[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def test_no_module_changes_the_process_when_it_is_imported() -> None:
    count, *found = lines_of(WATCH + ALL)
    assert int(count) > 150, "all modules are looked at"
    assert not found, found


def test_hooks_are_set_once_when_this_process_becomes_a_rank() -> None:
    first, second = lines_of(WATCH + CONNECT)
    assert "sys.excepthook" in first and "atexit" in first
    assert second == "nothing"


CHANGES = ["sys.excepthook = print", "atexit.register(int)", "warnings.simplefilter('error')"]


@pytest.mark.parametrize("line", slow_but([1], CHANGES))
def test_a_change_is_seen(line: str) -> None:
    (said,) = lines_of(f"{WATCH}\nbefore = state()\n{line}\nprint(changed(before))")
    assert said
