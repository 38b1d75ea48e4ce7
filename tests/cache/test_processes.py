"""Two processes that have nothing in common but their files: other hash seeds, other addresses, another folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import hashlib, sys
import autopar
from autopar.zoo.named import named_model
torch = __import__("torch")
example = named_model(sys.argv[1])
parallel = autopar.parallelize(example.model, autopar.Mesh(dp=2, tp=2), example_inputs=example.batch)
step = parallel.simulate(**example.batch)
print(hashlib.sha256(str(parallel.program).encode()).hexdigest(), step.loss.item())
"""


def run(folder: Path, seed: int, name: str, script: str = SCRIPT) -> tuple[str, str]:
    """What a process prints, and what it logs."""
    own = folder / str(seed)
    own.mkdir()
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "AUTOPAR_LOG": "debug", "PYTHONPATH": str(ROOT)}
    environment |= {"AUTOPAR_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, name]
    done = subprocess.run(command, cwd=own, env=environment, check=True, capture_output=True, text=True)
    return done.stdout, done.stderr


WARM = """
import sys, torch, torch.distributed as dist
import autopar
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
parallel = autopar.parallelize(model, autopar.Mesh(dp=1))
for _ in range(2):
    parallel(torch.ones(2, 4)).sum().backward()
print(parallel(torch.ones(2, 4)).shape, *sorted(sys.modules))
dist.destroy_process_group()
"""
NOT_NEEDED = (
    "autopar.compiler", "autopar.passes", "autopar.split", "autopar.rules", "autopar.frontend.trace", "networkx",
    "torch.export._trace", "torch._functorch.aot_autograd", "torch._inductor.codecache", "safetensors.torch", "rich",
)  # fmt: skip


@pytest.mark.slow
def test_a_second_launch_loads_no_compiler(tmp_path: Path) -> None:
    """Of a plain model too: whatever torch reads of the environment while its modules are loaded is no obstacle."""
    (first, said), (second, heard) = (run(tmp_path, seed, "", WARM) for seed in (1, 2))
    assert "compiling, since" in said and "was compiled before" in heard and "compiling" not in heard, heard
    assert set(NOT_NEEDED[:5]) <= set(first.split())
    assert not set(NOT_NEEDED) & set(second.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hf:llama", "hf:bert", "hf:vit", "hf:mixtral", "hf:t5", "hf:gpt2", "hf:mamba2", "unet"]
)
def test_the_second_finds_what_the_first_has_made(name: str, tmp_path: Path) -> None:
    (first, said), (second, heard) = (run(tmp_path, seed, name) for seed in (1, 2))
    assert first == second
    assert "compiling, since" in said and "was compiled before" in heard and "compiling" not in heard, heard
