"""The models that are measured, each with where torch's own tensor parallelism has to take hold of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from autopar.models import gpt, llama, moe

Batch = dict[str, Tensor]
BATCH, LENGTH, VOCABULARY = 8, 128, 512


@dataclass(frozen=True)
class Sites:
    """Names of modules: of the whole model, and of each block within it. ``columns`` and ``rows`` are linear layers;
    ``inputs`` are the modules around them, with how they are handed the hidden state: by a keyword, or as the first of
    that many positional arguments."""

    embedding: str
    blocks: str
    last_norm: str
    head: str
    norms: tuple[str, str]
    inputs: tuple[tuple[str, str | int], ...]
    columns: tuple[str, ...]
    rows: tuple[str, str]

    def block_names(self, model: nn.Module) -> Iterator[str]:
        layers = model.get_submodule(self.blocks)
        assert isinstance(layers, nn.ModuleList)
        yield from (f"{self.blocks}.{position}" for position in range(len(layers)))


HF_SITES = Sites(
    embedding="model.embed_tokens",
    blocks="model.layers",
    last_norm="model.norm",
    head="lm_head",
    norms=("input_layernorm", "post_attention_layernorm"),
    inputs=(("self_attn", "hidden_states"), ("mlp", 1)),
    columns=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
    rows=("self_attn.o_proj", "mlp.down_proj"),
)
OUR_SITES = Sites(
    embedding="tokens",
    blocks="blocks",
    last_norm="norm",
    head="head",
    norms=("attn_norm", "mlp_norm"),
    inputs=(("attn", 3), ("mlp", 1)),
    columns=("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"),
    rows=("attn.o", "mlp.down"),
)


@dataclass(frozen=True)
class Subject:
    """A model to measure. ``build`` gives the unmodified model, ``localised`` the edits that torch's tensor
    parallelism needs in it."""

    name: str
    build: Callable[[], nn.Module]
    sites: Sites
    vocabulary: int = VOCABULARY
    localised: Callable[[nn.Module], None] = lambda model: None

    def batch(self, seed: int, batch: int = BATCH, length: int = LENGTH) -> Batch:
        return tokens_with_labels(self.vocabulary, seed, batch, length)


def tokens_with_labels(vocabulary: int, seed: int, batch: int = BATCH, length: int = LENGTH) -> Batch:
    """Every token has a label, so that a mean of means is the mean: torch's own parallelism knows no other."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    return {"input_ids": tokens, "labels": tokens.clone()}


def hugging_face_llama(
    width: int, layers: int, vocabulary: int = VOCABULARY, head_width: int = 32, *, tied: bool = False
) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // head_width,
        num_key_value_heads=width // head_width // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.train()


def hugging_face_mixtral(width: int, layers: int, experts: int = 8) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        use_cache=False,
    )
    model: nn.Module = MixtralForCausalLM(config)
    return model.train()


def our_llama(width: int, layers: int) -> nn.Module:
    sizes = {"heads": width // 32, "kv_heads": width // 64, "ff": width * 11 // 4}
    return llama.build("tiny", vocab=VOCABULARY, context=LENGTH, width=width, layers=layers, **sizes)


def our_gpt(width: int, layers: int) -> nn.Module:
    sizes = {"context": LENGTH, "width": width, "layers": layers, "heads": width // 32}
    return gpt.build("tiny", vocab=VOCABULARY, **sizes)


def our_mixture(width: int, layers: int) -> nn.Module:
    sizes = {"heads": width // 32, "kv_heads": width // 64, "ff": width * 11 // 4, "experts": 8}
    return moe.build("tiny", vocab=VOCABULARY, context=LENGTH, width=width, layers=layers, **sizes)


def count_local_heads(model: nn.Module) -> None:
    """models/llama writes the full width where a rank has only its heads' part of it."""

    def forward(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, -1, attention.head_dim)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (attention.q, attention.k, attention.v))
        q, k = llama.rotate(q, cos, sin), llama.rotate(k, cos, sin)
        k, v = llama.repeat_heads(k, attention.groups), llama.repeat_heads(v, attention.groups)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = attention.o(y.transpose(1, 2).reshape(batch, length, -1))
        return found

    for module in model.modules():
        if isinstance(module, llama.Attention):
            module.forward = forward.__get__(module)  # type: ignore[method-assign]


SUBJECTS: Mapping[str, Subject] = MappingProxyType(
    {
        subject.name: subject
        for subject in (
            Subject("hf-llama-128", lambda: hugging_face_llama(128, 2, head_width=16), HF_SITES),
            Subject("hf-llama-256", lambda: hugging_face_llama(256, 4), HF_SITES),
            Subject("hf-llama-256-8", lambda: hugging_face_llama(256, 8), HF_SITES),
            Subject("hf-llama-512", lambda: hugging_face_llama(512, 4), HF_SITES),
            Subject("hf-llama-2k", lambda: hugging_face_llama(512, 4, 2048), HF_SITES, 2048),
            Subject("hf-llama-32k", lambda: hugging_face_llama(256, 4, 32_000), HF_SITES, 32_000),
            Subject("hf-llama-long", lambda: hugging_face_llama(512, 2, head_width=64), HF_SITES),
            Subject("hf-mixtral-256", lambda: hugging_face_mixtral(256, 4), HF_SITES),
            Subject("our-llama-256", lambda: our_llama(256, 4), OUR_SITES, localised=count_local_heads),
        )
    }
)
