"""Small Hugging Face models by architecture name, with random weights built from the config classes: ``hf:llama``.

Sizes divide by 2, 3 and 4, so that every preset fits meshes of these; the vocabulary holds all bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, PATCH, CLASSES, CHANNELS = 24, 6, 12, 3
LENGTH = 24

Batch = dict[str, Tensor]
MakeBatch = Callable[[Any, int, int, torch.Generator], Batch]


@dataclass(frozen=True)
class Preset:
    """Class names in ``transformers``, the fields of the config, and how a batch looks."""

    config: str
    model: str
    batch: MakeBatch
    fields: Mapping[str, Any]


def causal_batch(config: Any, batch: int, length: int, generator: torch.Generator) -> Batch:
    """Tokens and labels (B, T); row i ignores its first 1 + i labels (modulo T/2), so that rows count unequally."""
    input_ids = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    ignored = 1 + torch.arange(batch) % max(1, length // 2)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(torch.arange(length) < ignored[:, None], -100)}


def masked_batch(config: Any, batch: int, length: int, generator: torch.Generator) -> Batch:
    """Tokens (B, T) of which row i hides every 7th and its first i (modulo T/2); only hidden ones have labels."""
    tokens = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    places, extra = torch.arange(length), torch.arange(batch)[:, None] % max(1, length // 2)
    hidden = (places % 7 == 0) | (places < extra)
    return {"input_ids": tokens.masked_fill(hidden, 2), "labels": tokens.masked_fill(~hidden, -100)}


def pair_batch(config: Any, batch: int, length: int, generator: torch.Generator) -> Batch:
    """Source (B, T) and labels (B, T/2) of an encoder-decoder; row i ignores its last i labels (modulo T/2)."""
    source = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    target = torch.randint(3, config.vocab_size, (batch, max(1, length // 2)), generator=generator)
    ignored = torch.arange(batch)[:, None] % target.shape[1]
    return {
        "input_ids": source,
        "labels": target.masked_fill(torch.arange(target.shape[1]) >= target.shape[1] - ignored, -100),
    }


def image_batch(config: Any, batch: int, length: int, generator: torch.Generator) -> Batch:
    """Images (B, channels, size, size) and classes (B); there is no length."""
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    labels = torch.randint(config.num_labels, (batch,), generator=generator)
    return {"pixel_values": torch.randn(shape, generator=generator), "labels": labels}


WIDTHS: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "max_position_embeddings": 1024,
}
GROUPED: dict[str, Any] = {**WIDTHS, "num_key_value_heads": 12, "pad_token_id": 0}
GPT2: dict[str, Any] = {
    "vocab_size": 288,
    "n_embd": 192,
    "n_layer": 2,
    "n_head": 12,
    "n_positions": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": 288,
    "dim": 192,
    "hidden_dim": 384,
    "n_layers": 2,
    "n_heads": 12,
    "max_position_embeddings": 1024,
}
T5: dict[str, Any] = {
    "vocab_size": 288,
    "d_model": 192,
    "d_kv": 16,
    "d_ff": 384,
    "num_layers": 2,
    "num_heads": 12,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 288,
    "d_model": 192,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 384,
    "decoder_ffn_dim": 384,
    "max_position_embeddings": 1024,
}
IMAGES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_channels": CHANNELS,
    "num_labels": CLASSES,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 12, "num_experts_per_tok": 2, "intermediate_size": 96}

PRESETS: dict[str, Preset] = {
    "llama": Preset("LlamaConfig", "LlamaForCausalLM", causal_batch, GROUPED),
    "mistral": Preset("MistralConfig", "MistralForCausalLM", causal_batch, {**GROUPED, "sliding_window": 12}),
    "qwen2": Preset("Qwen2Config", "Qwen2ForCausalLM", causal_batch, GROUPED),
    "qwen3": Preset("Qwen3Config", "Qwen3ForCausalLM", causal_batch, {**GROUPED, "head_dim": 8}),
    "gemma": Preset("GemmaConfig", "GemmaForCausalLM", causal_batch, {**GROUPED, "head_dim": 8}),
    "phi": Preset("PhiConfig", "PhiForCausalLM", causal_batch, GROUPED),
    "mixtral": Preset("MixtralConfig", "MixtralForCausalLM", causal_batch, {**GROUPED, **EXPERTS}),
    "gpt2": Preset("GPT2Config", "GPT2LMHeadModel", causal_batch, GPT2),
    "gpt_neox": Preset("GPTNeoXConfig", "GPTNeoXForCausalLM", causal_batch, WIDTHS),
    "opt": Preset(
        "OPTConfig", "OPTForCausalLM", causal_batch, {**WIDTHS, "ffn_dim": 384, "word_embed_proj_dim": 192}
    ),
    "bert": Preset("BertConfig", "BertForMaskedLM", masked_batch, WIDTHS),
    "roberta": Preset("RobertaConfig", "RobertaForMaskedLM", masked_batch, WIDTHS),
    "distilbert": Preset("DistilBertConfig", "DistilBertForMaskedLM", masked_batch, DISTILBERT),
    "t5": Preset("T5Config", "T5ForConditionalGeneration", pair_batch, T5),
    "bart": Preset("BartConfig", "BartForConditionalGeneration", pair_batch, BART),
    "vit": Preset("ViTConfig", "ViTForImageClassification", image_batch, IMAGES),
    "deit": Preset("DeiTConfig", "DeiTForImageClassification", image_batch, IMAGES),
}


def config_of(name: str, overrides: Mapping[str, Any]) -> Any:
    """The config of a preset with ``overrides``; dropout is off unless they say otherwise.

    Raises ValueError for an unknown preset, for a field that the config class does not have, and where transformers is
    not installed.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset 'hf:{name}'; there are {', '.join(f'hf:{known}' for known in PRESETS)}")
    kind = getattr(_transformers(), PRESETS[name].config)
    known, renamed = kind(), kind.attribute_map
    for key in overrides:
        if not hasattr(known, key):
            raise ValueError(f"{kind.__name__} has no field '{key}'")
    fields = {renamed.get(key, key): value for key, value in PRESETS[name].fields.items()}
    fields |= {renamed.get(key, key): value for key, value in overrides.items()}
    config = kind(**fields)
    for key, value in vars(config).items():
        if ("drop" in key or "jitter" in key) and isinstance(value, float) and key not in overrides:
            setattr(config, key, 0.0)
    if "experts_implementation" not in overrides:
        config._experts_implementation = "batched_mm"  # the default has no float64 kernel, and a loop does not trace
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache in the output is of no use in training
    return config


def build(name: str, config: Any) -> nn.Module:
    """The model of a preset for ``config``, in training mode."""
    model: nn.Module = getattr(_transformers(), PRESETS[name].model)(config)
    return model.train()


def example_batch(name: str, config: Any, batch: int, length: int | None = None, seed: int = 0) -> Batch:
    """Random inputs and labels: keyword arguments of the model."""
    if length is not None and PRESETS[name].batch is image_batch:
        raise ValueError(f"hf:{name} takes images: there is no length")
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(seed)
        return PRESETS[name].batch(config, batch, length or LENGTH, generator)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "presets hf:... need the transformers library\nWay out: pip install 'autopar[hf]'"
        ) from None
    return transformers
