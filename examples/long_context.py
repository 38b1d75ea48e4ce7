"""Train on long sequences: each rank of sp has a part of the positions of every activation.

torchrun --nproc-per-node 4 examples/long_context.py --mesh sp=4 --length 4096
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autopar


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of three steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(sp=1))
    parser.add_argument("--length", type=int, default=256, help="of a row; twice the ranks of sp have to divide it")
    parser.add_argument("--attention", default="auto", help="ring, ulysses, gather, hybrid or auto")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(use_cache=False, vocab_size=256, max_position_embeddings=given.length, **sizes)
    )
    plan = autopar.Plan(attention=given.attention, recompute="selective", inputs="local")
    parallel = autopar.parallelize(model, given.mesh, plan)

    losses = []
    optimizer = None
    for _ in range(given.steps):
        tokens = torch.randint(256, (1, given.length))
        whole = {"input_ids": tokens, "labels": tokens.clone()}
        # This rank's part of it. With data on disk, autopar.TokenFile reads no more than that part.
        batch = autopar.part_of_batch(whole, given.mesh, plan)
        loss = parallel.train_step(**batch)
        optimizer = optimizer or torch.optim.AdamW(parallel.parameters(), lr=1e-3)
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    if torch.distributed.get_rank() == 0:
        print(f"{given.mesh}, {given.length} positions: losses {losses}")
        for transfer in parallel.traffic:
            print(transfer)
    return losses


if __name__ == "__main__":
    main()
