"""Each technique on real ranks for hundreds of steps, with many collectives under way: every loss is the unmodified
model's, and every rank ends by itself, with exit code 0 and nothing to say.

What is found here and nowhere else: memory that a collective still writes to, orders that differ between ranks, a rank
that cannot end. Run on a quiet machine before an issue is closed: ``pytest -m slow tests/end_to_end/test_soak.py``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.mesh import Mesh
from autopar.models import llama, moe
from tests.end_to_end.soak_rank import model, sizes_on, train

ROOT = Path(__file__).parents[2]
STEPS, FEW_STEPS = 300, 12
TOLERANCE = 1e-9  # of a loss after hundreds of steps in float64, each of which starts from the rounding of those before

Run = tuple[str, dict[str, Any]]

QUICK: list[Run] = [("dp=2", {"zero": 3})]
RUNS: list[Run] = [
    *(("dp=2", {"zero": stage}) for stage in (0, 1, 2, 3)),
    ("dp=3", {"zero": 3, "overlap_mb": 1000.0}),
    ("dp=2", {"zero": 3, "reshard_after_forward": False, "microbatches": 2}),
    ("dp=2", {"zero": 3, "recompute": "full"}),
    ("tp=2", {}),
    ("tp=2", {"sequence": "megatron"}),
    ("dp=2,tp=2", {"zero": 2, "sequence": "megatron", "bucket_mb": 1.0}),
    *(
        ("pp=2", {"schedule": name, "microbatches": 4})
        for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v")
    ),
    *(("sp=2", {"attention": form}) for form in ("ring", "gather", "ulysses")),
    ("sp=3", {"attention": "ring", "overlap_mb": 1000.0}),
    ("sp=4", {"attention": "hybrid"}),
    ("dp=2,sp=2", {"attention": "ring", "zero": 3}),
    ("sp=2,tp=2", {"attention": "ulysses", "zero": 2, "sequence": "megatron"}),
    ("pp=2,sp=2", {"attention": "ring", "microbatches": 4}),
    ("dp=2,sp=2,tp=2", {"attention": "ring", "zero": 3, "recompute": "full"}),
    ("ep=2", {}),
    ("ep=4", {"zero": 3}),
    ("dp=2,ep=2", {"zero": 1}),
    ("ep=2,tp=2", {"expert_axes": "ep+tp"}),
    ("ep=2,sp=2", {}),
    ("pp=2,ep=2", {"microbatches": 2}),
    ("dp=2,ep=2,sp=2", {"zero": 2, "recompute": "full"}),
    ("pp=2,dp=2", {"zero": 1, "schedule": "zb-v", "microbatches": 4}),
    ("pp=2,dp=2,tp=2", {"zero": 3, "schedule": "1f1b", "microbatches": 2}),
    ("dp=2,tp=2", {"zero": 3, "compile": "inductor"}),
    ("pp=2", {"microbatches": 4, "compile": "inductor"}),
]


def named(runs: list[Run]) -> list[Any]:
    def name(mesh: str, plan: dict[str, Any]) -> str:
        return " ".join([mesh.replace("=", ":"), *(f"{key}:{choice}" for key, choice in plan.items())])

    return [pytest.param(*run, id=name(*run)) for run in runs]


@cache
def losses_of_one_process(sizes: llama.Config | moe.Config, steps: int) -> list[float]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return train(model(sizes), steps)
    finally:
        torch.set_default_dtype(before)


def run(mesh: str, plan: dict[str, Any], steps: int, seconds: float) -> list[subprocess.CompletedProcess[str]]:
    """A plain process for every rank, as torchrun starts them; its exit code and what it wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = Mesh.parse(mesh).world_size
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "tests.end_to_end.soak_rank",
        json.dumps({"mesh": mesh, "plan": plan, "steps": steps}),
    ]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [
            subprocess.CompletedProcess(command, process.wait(), *texts)
            for process in processes
            if (texts := process.communicate(timeout=seconds))
        ]
    finally:
        for process in processes:
            process.kill()


def check(mesh: str, plan: dict[str, Any], steps: int, seconds: float) -> None:
    expected = losses_of_one_process(sizes_on(mesh), steps)
    for rank, ended in enumerate(run(mesh, plan, steps, seconds)):
        assert ended.returncode == 0, f"rank {rank} ended with {ended.returncode}:\n{ended.stderr[-2000:]}"
        assert "terminate called" not in ended.stderr and "Traceback" not in ended.stderr, ended.stderr[-2000:]
        losses = json.loads(ended.stdout.splitlines()[-1])
        worst = max(abs(found - wanted) / wanted for found, wanted in zip(losses, expected, strict=True))
        assert worst <= TOLERANCE, f"rank {rank}: the losses differ by {worst:.1e}"
        if rank == 0:
            print(f"{mesh} {plan}: {steps} steps, losses {losses[0]:.3f} -> {losses[-1]:.3f}, worst {worst:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "plan"), named(QUICK))
def test_some_steps(mesh: str, plan: dict[str, Any]) -> None:
    check(mesh, plan, FEW_STEPS, seconds=200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("mesh", "plan"), named(RUNS))
def test_hundreds_of_steps(mesh: str, plan: dict[str, Any]) -> None:
    check(mesh, plan, STEPS, seconds=1500)
