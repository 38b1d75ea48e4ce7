"""Processes of a machine that share what Inductor has compiled: one after the other, two at once, without compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autopar.compiler import compile_program
from autopar.mesh import Mesh
from autopar.plan import Plan

ROOT = Path(__file__).parents[2]
FIRST_STEP = """
import json, re, subprocess, sys
import torch
import autopar
from autopar.inductor.compiled_region import counted
from tests.inductor.test_processes import example, model

compilers, start = [], subprocess.Popen.__init__

def watched(self, args, *rest, **named):
    command = args if isinstance(args, str) else " ".join(map(str, args))
    compilers.extend(re.findall(r" -o (\\S+\\.so)", command))
    start(self, args, *rest, **named)

subprocess.Popen.__init__ = watched
parallel, whole = autopar.parallelize(model(), autopar.Mesh(), program=sys.argv[1]), model()
with counted() as count:
    losses = [module(example())["loss"] for module in (parallel, whole)]
    for loss in losses:
        loss.backward()
grads = parallel.full_grads()
worst = max(float((grads[name] - each.grad).abs().max()) for name, each in whole.named_parameters())
print(json.dumps([count.compiled, count.left, compilers, worst, float(abs(losses[0] - losses[1]))]))
"""


def model() -> nn.Module:
    torch.manual_seed(0)
    return _Loss().double()


def example() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class _Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x + self.down(torch.tanh(self.up(x)) * 2).sigmoid()).square().sum()}


def started(program: Path, cache: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", FIRST_STEP, str(program)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> list[Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    found: list[Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """On the disk, with the choice of its plan."""
    path = tmp_path / "program"
    compile_program(model(), Mesh(), Plan(compile="inductor", check_numerics=False), (example(),)).save(path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_that_start_at_once_compile_each_region_once_and_the_third_none(program: Path, tmp_path: Path) -> None:
    """All take a program from the disk that was compiled for Inductor, and do what the model does."""
    cache = tmp_path / "cache"
    together = [ended(process) for process in [started(program, cache), started(program, cache)]]
    third = ended(started(program, cache))
    for compiled, left, _, worst, loss in [*together, third]:
        assert compiled and not left and worst <= 1e-14 and loss <= 1e-14
    files = [file for each in together for file in each[2]]
    assert len(set(files)) == len(files) > 0 and not third[2]


@pytest.mark.slow
def test_a_path_without_a_compiler_is_an_error_in_words(program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "uname"):
        (folder / name).symlink_to(shutil.which(name) or "")
    process = started(program, tmp_path / "cache", PATH=str(folder))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    said = (
        'AutoparError: Plan(compile="inductor") needs a C++ compiler (g++ or clang++, or what CXX names), which this '
    )
    assert said in err.splitlines()[-2] and err.splitlines()[-1].endswith('or Plan(compile="python").'), err
