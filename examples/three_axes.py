"""64 ranks, 4 pipeline stages x 4 replicas x 4 parts of each layer, simulated in this process.

python examples/three_axes.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import autopar
from autopar.models import llama


def main(arguments: Sequence[str] = (), layers: int = 4) -> None:
    torch.manual_seed(0)
    model = llama.build("tiny", layers=layers).double()
    batch = llama.example_batch(model, batch=32)
    mesh = autopar.Mesh(pp=4, dp=4, tp=4, node_size=8)
    parallel = autopar.parallelize(model, mesh, autopar.Plan(microbatches=8), example_inputs=batch)
    step = parallel.simulate(**batch)
    loss = model(**batch)["loss"]
    loss.backward()
    worst = max(float((step.grads[name] - p.grad).abs().max()) for name, p in model.named_parameters())
    print(f"{mesh}: loss differs by {abs(float(step.loss - loss.detach())):.1e}, gradients by at most {worst:.1e}")
    for transfer in step.traffic:
        print(transfer)
    assert worst < 1e-12


if __name__ == "__main__":
    main()
