"""Seconds and memory that compiling DeepSeek-V3 for all five axes takes, at several depths, and a rank's parameters.

    python -m benchmarks.expert_compile              pp=8 x dp=4 x ep=8 x tp=2; 8, 16 and 61 layers, a process each
    python -m benchmarks.expert_compile --layers 8 --mesh dp=4,ep=8 --json

Hugging Face's ``DeepseekV3ForCausalLM`` as published (61 layers, the first three dense, 7168 wide, 256 routed experts
of 2048 of which each token has 8, a shared one, latent attention, a vocabulary of 129,280) in bfloat16 on the meta
device: no weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console
from torch import nn

from autopar.mesh import Mesh
from autopar.plan import Plan
from benchmarks.compile_70b import Compilation, batch_of, compilation, table_of

MODULE = "benchmarks.expert_compile"
LAYERS = (8, 16, 61)
DENSE_LAYERS = 3
LENGTH = 4096
MICROBATCHES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.worker:
        print(json.dumps(asdict(_compiled(options.layers[0], options.mesh, options.zero))))
        return 0
    found = [_apart(layers, options) for layers in options.layers]
    if options.json:
        print(json.dumps([asdict(entry) for entry in found], indent=2))
    else:
        title = f"DeepSeek-V3, HF DeepseekV3ForCausalLM on meta, {found[0].mesh}, zero={options.zero}"
        Console(width=None if sys.stdout.isatty() else 120).print(table_of(found, f"{title}: processor seconds"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--mesh", default="pp=8,dp=4,ep=8,tp=2")
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # compile here, print JSON
    return parser


def _apart(layers: int, options: argparse.Namespace) -> Compilation:
    """In a process of its own, so that its peak of memory is its own too."""
    command = [sys.executable, "-m", MODULE, "--worker", "--layers", str(layers)]
    command += ["--mesh", options.mesh, "--zero", str(options.zero)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Compilation(**json.loads(done.stdout.splitlines()[-1]))


def _compiled(layers: int, named: str, zero: int) -> Compilation:
    mesh = Mesh.parse(named)
    microbatches = MICROBATCHES if mesh.size("pp") > 1 else 1
    plan = Plan(microbatches=microbatches, zero=zero)
    rows = microbatches * mesh.size("dp") * mesh.size("ep")
    return compilation(deepseek_v3(layers), batch_of(rows, LENGTH), layers, mesh, plan)


def deepseek_v3(layers: int) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        moe_intermediate_size=2048,
        num_hidden_layers=layers,
        first_k_dense_replace=DENSE_LAYERS,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=LENGTH,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: nn.Module = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    return model.train()


if __name__ == "__main__":
    sys.exit(main())
