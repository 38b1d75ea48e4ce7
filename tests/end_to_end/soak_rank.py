"""One rank of a soak: a script as a user writes it, that trains a Llama for many steps and then simply ends.

Started once per rank with torchrun's environment; the argument is JSON: mesh, plan, steps. Rank 0 prints the losses.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn

import autopar
from models import llama

# wide and deep enough that gathers and reductions of several blocks are under way at the same time
SIZES = llama.Config(vocab=512, context=12, width=384, layers=6, heads=8, kv_heads=4, ff=1024)
ROWS, LENGTH = 12, 12  # little to compute beside what is sent


def model() -> nn.Module:
    torch.manual_seed(0)
    return llama.Llama(SIZES).double()


def batch(step: int) -> dict[str, Tensor]:
    """Another one in each of seven steps, with unequally many labels in each row."""
    return llama.example_batch(SIZES, ROWS, LENGTH, seed=step % 7)


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
    parallel = autopar.parallelize(model(), autopar.Mesh.parse(run["mesh"]), plan)
    print(json.dumps(train(parallel, run["steps"])))


if __name__ == "__main__":
    main()
