"""What an import does: nothing to the process that imports. Hooks and filters are set when a run starts."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.test_layering import OURS, imported, module_name, sources, tree_of

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
from autopar.communication.connect import connect
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


@pytest.mark.slow
@pytest.mark.parametrize("line", CHANGES)
def test_a_change_is_seen(line: str) -> None:
    (said,) = lines_of(f"{WATCH}\nbefore = state()\n{line}\nprint(changed(before))")
    assert said


# In a process that was forked before anything was compiled, so that this one has no more than it needs itself.
LAUNCH = """
import os, sys
import torch
import autopar

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())

def step(**program):
    parallel = autopar.parallelize(model(), autopar.Mesh(dp=1), **program)
    loss = parallel(torch.ones(2, 4)).sum()
    loss.backward()
    return loss.item(), [name for name in sys.argv[2:] if name in sys.modules]

if os.fork() == 0:
    autopar.compile_program(model(), autopar.Mesh(dp=1), None, (torch.ones(2, 4),)).save(sys.argv[1])
    print(*step(), sep="\\n", flush=True)
    os._exit(0)
assert os.wait()[1] == 0
print(*step(), *step(program=sys.argv[1]), sep="\\n")
"""
OF_THE_COMPILER = (
    "autopar.compiler", "autopar.passes", "autopar.frontend.trace", "autopar.split", "autopar.rules",
    "torch.export._trace",
)  # fmt: skip
OF_OTHERS = ("autopar.analysis", "autopar.simulator", "networkx", "rich", "torch.distributed.checkpoint")


def test_parallelize_is_imported_without_the_compiler() -> None:
    """As the statements say; what is inside functions and for typing is not run by an import."""
    found = _loaded_with(["autopar.api"])
    assert {"autopar.module", "autopar.cache.compiled", "torch"} <= found
    assert found.isdisjoint((*OF_THE_COMPILER, *OF_OTHERS, "autopar.stored_programs"))


def _loaded_with(waiting: list[str]) -> set[str]:
    """These modules and all that their imports load."""
    found = set[str]()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [parent for parent, _, _ in [name.rpartition(".")] if parent]
            waiting += _imported_at_once(tree_of(OURS[name]).body) if name in OURS else []
    return found


def _imported_at_once(body: Iterable[ast.stmt]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield from imported(statement)
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.dump(statement.test):
            yield from _imported_at_once([*statement.body, *statement.orelse])
        elif isinstance(statement, (ast.Try, ast.With)):
            yield from _imported_at_once(statement.body)


@pytest.mark.slow
def test_a_launch_whose_program_is_there_loads_no_compiler(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCH, str(tmp_path / "program"), *OF_THE_COMPILER, *OF_OTHERS]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AUTOPAR_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    losses, loaded = ran.stdout.splitlines()[::2], ran.stdout.splitlines()[1::2]
    assert len(set(losses)) == 1 and len(losses) == 3, losses
    cold, warm, from_disk = map(ast.literal_eval, loaded)
    assert set(cold) >= set(OF_THE_COMPILER), "the names are those of what a compile loads"
    assert warm == [] == from_disk


REGISTER = {"autopar.operators", "autopar.ir.collectives"}  # what is in ``torch.ops.autopar``


def registers(name: str, body: list[ast.stmt]) -> bool:
    """Whether autopar's operators are there for the module ``name``: by its imports, or since it is one of them."""
    loaded = _loaded_with(list(_imported_at_once(body)))
    return not loaded.isdisjoint(REGISTER) or f"{name}.".startswith(tuple(f"{each}." for each in REGISTER))


def names_operators(path: Path) -> bool:
    if "torch.ops.autopar" not in path.read_text(encoding="utf-8"):
        return False
    attributes = [
        node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute) and node.attr == "autopar"
    ]
    return any(ast.unparse(node) == "torch.ops.autopar" for node in attributes)


def test_who_names_an_operator_of_autopar_imports_it() -> None:
    """Where another file happens to be imported first it is there by chance; a test file alone was not collected so."""
    files = {module_name(path): path for path in sources("tests", "benchmarks", "examples")} | OURS
    naming = [name for name, path in files.items() if names_operators(path)]
    assert len(naming) > 5
    assert not [name for name in naming if not registers(name, tree_of(files[name]).body)]


def test_an_operator_by_chance_is_found() -> None:
    line = "OPERATOR = torch.ops.autopar.attention.default"
    assert not registers("tests.some", ast.parse(f"import torch\nfrom autopar.ir import layout\n{line}").body)
    assert registers("tests.some", ast.parse(f"import torch\nfrom autopar.operators import attention\n{line}").body)


# Forks of a process that has loaded torch and nothing of ours; a module costs 0.3 s, and there are a thousand.
ALONE = """
import gc, importlib, os, sys
import hypothesis, networkx, pytest, rich.console, safetensors.torch, torch, transformers, typer
import torch.distributed.checkpoint, torch.distributed.tensor, torch.export, torch._functorch.aot_autograd

gc.freeze()
for name in sys.argv[1:]:
    if os.fork() == 0:
        try:
            importlib.import_module(name)
        except BaseException as problem:
            print(f"{name}: {problem!r}", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_module_is_imported_by_itself() -> None:
    """Those of tests too, as when one file is collected: none needs what another one has imported before it."""
    names = [*OURS, *(module_name(path) for path in sources("tests"))]
    command = [sys.executable, "-c", ALONE, *(name for name in names if not name.endswith("__main__"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and not ran.stdout, ran.stdout + ran.stderr
