"""Pretrain a small Llama on the bytes of your own text, with checkpoints that any mesh can go on from.

torchrun --nproc-per-node 4 examples/pretrain_text.py book.txt --mesh dp=2,tp=2 --zero 1 --checkpoint /shared/run
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

import autopar

BYTES = 256


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(dp=1))
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--checkpoint", type=Path, help="a directory that all ranks see; the run goes on from its latest"
    )
    parser.add_argument("--every", type=int, default=10, help="steps from one checkpoint to the next")
    return parser.parse_args(arguments)


def batch_of(text: Tensor, step: int, rows: int, length: int) -> dict[str, Tensor]:
    """The batch of a step: the same on every rank, and after every restart, since it depends on the step alone."""
    places = torch.randint(len(text) - length, (rows,), generator=torch.Generator().manual_seed(step))
    tokens = torch.stack([text[place : place + length] for place in places.tolist()]).long()
    return {"input_ids": tokens, "labels": tokens.clone()}


def built(given: argparse.Namespace) -> LlamaForCausalLM:
    """From one seed: the same weights on every rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": given.width, "intermediate_size": 3 * given.width, "num_hidden_layers": given.layers}
    return LlamaForCausalLM(
        LlamaConfig(use_cache=False, vocab_size=BYTES, num_attention_heads=4, num_key_value_heads=4, **sizes)
    )


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of the steps that were run."""
    given = parsed(arguments)
    text = torch.frombuffer(bytearray(given.text.read_bytes()), dtype=torch.uint8)
    model = autopar.parallelize(built(given), given.mesh, autopar.Plan(zero=given.zero))
    model.prepare(**batch_of(text, 0, given.batch, given.length))  # from now on a rank has its parts only
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))

    checkpoints = autopar.Checkpoints(given.checkpoint) if given.checkpoint else None
    resumed = checkpoints.load(model, optimizer, scheduler=scheduler) if checkpoints else None
    losses = []
    for step in range(resumed.step if resumed else 0, given.steps):
        loss = model.train_step(**batch_of(text, step, given.batch, given.length))
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(float(loss))
        if torch.distributed.get_rank() == 0:
            print(f"step {step + 1} loss {losses[-1]:.4f}", flush=True)
        if checkpoints and ((step + 1) % given.every == 0 or step + 1 == given.steps):
            checkpoints.save(step + 1, model, optimizer, scheduler=scheduler, wait=step + 1 == given.steps)
    return losses


if __name__ == "__main__":
    main()
