"""Train LoRA adapters (the package peft) of a Llama whose frozen weights are split over the mesh.

torchrun --nproc-per-node 2 examples/lora.py --mesh tp=2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import autopar


def built() -> torch.nn.Module:
    """Of a model of yours: AutoModelForCausalLM.from_pretrained(folder)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(use_cache=False, vocab_size=256, num_key_value_heads=4, **sizes))
    adapted: torch.nn.Module = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    return adapted


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The losses of all steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", type=autopar.Mesh.parse, default=autopar.Mesh(dp=1))
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, help="a file for the adapters alone")
    given = parser.parse_args(arguments)

    model = autopar.parallelize(built(), given.mesh, autopar.Plan(zero=given.zero))
    tokens = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    model.prepare(**batch)
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)  # states for the adapters alone
    losses = []
    for _ in range(given.steps):
        losses.append(float(model.train_step(**batch)))
        optimizer.step()
        optimizer.zero_grad()

    whole = model.full_state_dict(rank0_only=True)  # gathered tensor by tensor
    if torch.distributed.get_rank() == 0:
        trained = sum(parameter.numel() for parameter in adapters.values())
        print(f"{given.mesh}: {trained:,} numbers are trained, losses {losses}")
        if given.output:
            torch.save({name: whole[name] for name in adapters}, given.output)
    return losses


if __name__ == "__main__":
    main()
