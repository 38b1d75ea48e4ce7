"""Train a mixture of experts whose experts are dealt out over ep, and place them by their load.

torchrun --nproc-per-node 4 examples/mixture_of_experts.py --mesh dp=2,ep=2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import autopar


def built() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    return MixtralForCausalLM(MixtralConfig(use_cache=False, vocab_size=256, **sizes, **experts))


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of all steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(ep=1))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--capacity", type=float, help="rows an expert takes, times its even share; none: all rows")
    given = parser.parse_args(arguments)

    plan = autopar.Plan(record_load=True, capacity_factor=given.capacity)
    model = autopar.parallelize(built(), given.mesh, plan)
    tokens = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    model.prepare(**batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(given.steps):
        losses.append(float(model.train_step(**batch)))
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    loads = model.expert_load()  # of all ranks, on every rank
    placement = autopar.balanced_placement(loads) if given.mesh.size("ep") > 1 else {}
    if torch.distributed.get_rank() == 0:
        print(f"{given.mesh}: losses {losses}")
        for layer, load in loads.items():
            print(f"{layer}: rows of each expert {list(load.experts)}, dropped {load.lost}")
        for layer, order in placement.items():
            print(f"{layer}: Plan(expert_placement=...) for the next run: {list(order)}")
    return losses


if __name__ == "__main__":
    main()
