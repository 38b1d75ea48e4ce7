"""One rank of a soak: a script as a user writes it, that trains a model for many steps and then simply ends.

Started once per rank with torchrun's environment; the argument is JSON: mesh, plan, steps. Rank 0 prints the losses.
The model is a Llama, or on a mesh with ``ep`` a mixture of experts whose router has a loss of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
from torch import Tensor, nn

import autopar
from autopar.mesh import EXPERTS, PIPELINE, Mesh
from autopar.models import llama, moe

# wide and deep enough that gathers and reductions of several blocks are under way at the same time
LLAMA = llama.Config(vocab=512, context=12, width=384, layers=6, heads=8, kv_heads=4, ff=1024)
MIXTURE = moe.Config(
    vocab=512, context=12, width=192, layers=4, heads=8, kv_heads=4, ff=128, experts=8, top_k=2, balance=0.05
)
ROWS, LENGTH = 12, 12  # little to compute beside what is sent


def sizes_on(mesh: str) -> llama.Config | moe.Config:
    """Of the model for a mesh. On ``pp`` the router has no loss: that of a batch is not a mean over microbatches."""
    axes = Mesh.parse(mesh).names
    mixture = replace(MIXTURE, balance=0.0) if PIPELINE in axes else MIXTURE
    return mixture if EXPERTS in axes else LLAMA


def model(sizes: llama.Config | moe.Config) -> nn.Module:
    torch.manual_seed(0)
    built = moe.Mixtral(sizes) if isinstance(sizes, moe.Config) else llama.Llama(sizes)
    return built.double()


def batch(step: int) -> dict[str, Tensor]:
    """Another one in each of seven steps, with unequally many labels in each row."""
    return llama.example_batch(LLAMA, ROWS, LENGTH, seed=step % 7)


def train(module: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    losses = []
    for step in range(steps):
        if isinstance(module, autopar.ParallelModule):
            loss = module.train_step(**batch(step))
        else:
            loss = module(**batch(step))["loss"]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    run = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    plan = autopar.Plan(check_numerics=False, **run["plan"])
    parallel = autopar.parallelize(model(sizes_on(run["mesh"])), Mesh.parse(run["mesh"]), plan)
    print(json.dumps(train(parallel, run["steps"])))


if __name__ == "__main__":
    main()
