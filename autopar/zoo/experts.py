"""Mixtures of experts: decoders whose MLP is chosen for each token by a router."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autopar.zoo.architecture import Architecture
from autopar.zoo.decoders import GROUPED, LATENT, decoder

FEW: dict[str, Any] = {"num_experts": 12, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 12, "num_experts_per_tok": 2, "intermediate_size": 96}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
}
DEEPSEEK: dict[str, Any] = {**ROUTED, **LATENT, "n_shared_experts": 1, "topk_group": 1}


def _experts(name: str, model: str | None = None, **fields: Any) -> Architecture:
    return decoder(name, {**GROUPED, **fields}, model, "moe")


ARCHITECTURES: dict[str, Architecture] = {
    "mixtral": _experts("Mixtral", **LOCAL),
    "qwen2_moe": _experts("Qwen2Moe", **FEW, moe_intermediate_size=96, shared_expert_intermediate_size=96),
    "qwen3_moe": _experts("Qwen3Moe", **FEW, moe_intermediate_size=96, head_dim=8),
    "deepseek_v2": _experts("DeepseekV2", **DEEPSEEK, q_lora_rank=None, n_group=1),
    "deepseek_v3": _experts("DeepseekV3", **DEEPSEEK, q_lora_rank=48, n_group=2),
    "gpt_oss": _experts("GptOss", **LOCAL, head_dim=8, sliding_window=12),
    "olmoe": _experts("Olmoe", **FEW, intermediate_size=96),
    "granitemoe": _experts("GraniteMoe", **LOCAL),
    "llama4_text": _experts(
        "Llama4Text",
        "Llama4ForCausalLM",
        **{**LOCAL, "num_experts_per_tok": 1},
        interleave_moe_layer_step=1,
        head_dim=8,
        intermediate_size_mlp=384,
        attention_chunk_size=12,
    ),
    "phimoe": replace(_experts("Phimoe", **LOCAL), draws=True),
    "glm4_moe": _experts("Glm4Moe", **ROUTED, n_group=1, topk_group=1, n_shared_experts=1, head_dim=8),
    "ernie4_5_moe": _experts(
        "Ernie4_5_Moe",
        "Ernie4_5_MoeForCausalLM",
        moe_num_experts=12,
        moe_k=2,
        moe_intermediate_size=96,
        moe_layer_start_index=0,
        moe_num_shared_experts=1,
    ),
}
