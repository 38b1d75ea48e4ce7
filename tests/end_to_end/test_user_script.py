"""Scripts with the habits that people have, on real ranks that start from the cache: every number is one device's.

A first launch makes the programs; the second one, which is looked at, runs the Python that was kept with
them. ``pytest -m slow`` has 300 steps of all meshes and both optimizers; what a process holds does not grow meanwhile.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from autopar import Mesh, Plan, parallelize
from autopar.cache import compiled
from autopar.compiler import compile_program
from autopar.runtime.execute import Executable
from autopar.runtime.execute_pipeline import PipelineExecutable
from autopar.runtime.written_code import WrittenCode
from tests.end_to_end.user_script import COPIED, HABITS, OF_PIPELINES, OPTIMIZERS, Script, batch, build
from tests.launch import run_ranks
from tests.selection import slow_but

STEPS, FEW = 300, len(HABITS) + 1
SETTLED = 150  # steps; of 4,000 the first 500 take 2 MB
TOLERANCE = 1e-9  # after hundreds of steps in float64, each of which starts from the rounding of those before
# by which a process may differ after as many steps again; torch's own DistributedDataParallel takes 1 MB in 1,000 steps
MEGABYTES, OBJECTS = 1.5, 300

RUNS: list[tuple[str, dict[str, Any]]] = [
    ("dp=2", {}),
    ("dp=2", {"zero": 1}),
    ("dp=2", {"zero": 2}),
    ("dp=2", {"zero": 3}),
    ("tp=2", {}),
    ("pp=2", {"schedule": "1f1b", "microbatches": 2}),
    ("sp=2", {}),
    ("ep=2", {}),
]


class HeapOfC(ctypes.Structure):
    """``mallinfo2``; see mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def held() -> tuple[int, float]:
    """Objects of Python, numbers too, and megabytes that were asked of the C library and not given back.

    Not pages of the process: how many of them lie free is a matter of the allocator, and differs by megabytes.
    """
    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = HeapOfC
    heap = ask()
    return sys.getallocatedblocks(), (heap.uordblks + heap.hblkhd) / 1e6


def run(mesh: str, plan: dict[str, Any], optimizer: str, steps: int, folder: str) -> dict[str, Any]:
    """On each rank; the last one has no unmodified model beside it, which would show in its memory."""
    torch.set_default_dtype(torch.float64)
    os.environ["AUTOPAR_CACHE"] = folder
    habits = OF_PIPELINES if Mesh.parse(mesh).is_pipelined else HABITS
    theirs = Script(build(mesh), optimizer) if os.environ["RANK"] == "0" else None
    found: dict[str, Any] = {"seen": 0.0, "gradients": 0.0}
    with mock.patch.object(compiled, "compile_program", side_effect=compile_program) as counted:
        module = parallelize(build(mesh), Mesh.parse(mesh), Plan(check_numerics=False, timeout=20, **plan))
        if module.mesh.is_pipelined:
            module.prepare(**batch(0), adapted=True)  # so that the optimizer has, as copies, those of its stages
        ours = Script(module, optimizer)
        del module
        for step in range(steps):
            found["kept"] = all(type(code) is WrittenCode for code in codes(ours)) if step < COPIED else found["kept"]
            seen, grads = ours.step(step, habits)
            if theirs is not None:
                compare(found, seen, grads, *theirs.step(step, habits), f"step {step}")
            if step in (SETTLED, steps - 1):
                found[f"at {step}"] = held()
    found["compiled"] = counted.call_count
    return found


def compare(
    found: dict[str, Any], seen: list[float], grads: dict[str, Tensor], see: list[float], wants: Any, where: str
) -> None:
    assert set(grads) == set(wants), f"{where}: {set(grads) ^ set(wants)}"
    assert len(seen) == len(see), where
    largest = max(float(grad.abs().max()) for grad in wants.values())
    errors = [float((grad - wants[name]).abs().max()) / largest for name, grad in grads.items()]
    found["gradients"] = max(found["gradients"], *errors)
    found["seen"] = max(found["seen"], *(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(seen, see)))
    if found["gradients"] > TOLERANCE or found["seen"] > TOLERANCE:
        raise AssertionError(f"{where}: {found}, {seen} in place of {see}")


def codes(script: Script) -> list[Any]:
    module: Any = script.module
    bound = [entry.bound for entry in module._programs._bound.values()]
    whole = [each.code for each in bound if isinstance(each, Executable)]
    stages = [each.stages for each in bound if isinstance(each, PipelineExecutable)]
    return [*whole, *(stage.code for each in stages for several in each.values() for stage in several)]


def check(mesh: str, plan: dict[str, Any], optimizer: str, steps: int, folder: Path) -> None:
    ranks = Mesh.parse(mesh).world_size
    first = run_ranks(run, ranks, mesh, plan, optimizer, FEW, str(folder))
    assert sum(each["compiled"] for each in first) > 0
    found = run_ranks(run, ranks, mesh, plan, optimizer, steps, str(folder), timeout=200)
    assert [each["compiled"] for each in found] == [0] * ranks, found
    assert all(each["kept"] for each in found), "some Python was written again"
    assert max(found[0]["seen"], found[0]["gradients"]) <= TOLERANCE
    if steps > SETTLED:
        (objects, megabytes), (objects_now, megabytes_now) = found[-1][f"at {SETTLED}"], found[-1][f"at {steps - 1}"]
        print(f"{mesh} {plan} {optimizer}: {found[0]['seen']:.1e} {found[0]['gradients']:.1e}", file=sys.stderr)
        print(f"objects {objects} {objects_now}, MB {megabytes:.1f} {megabytes_now:.1f}", file=sys.stderr)
        assert objects_now - objects < OBJECTS and megabytes_now - megabytes < MEGABYTES, found[-1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("mesh", "plan"), RUNS, ids=["ddp", "zero1", "zero2", "zero3", "tp", "pp", "sp", "ep"])
@pytest.mark.slow
def test_hundreds_of_steps(mesh: str, plan: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    check(mesh, plan, optimizer, STEPS, tmp_path)


@pytest.mark.parametrize(("mesh", "plan"), slow_but([1], RUNS))
def test_some_steps(mesh: str, plan: dict[str, Any], tmp_path: Path) -> None:
    check(mesh, plan, "AdamW", FEW, tmp_path)
