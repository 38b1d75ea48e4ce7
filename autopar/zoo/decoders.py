"""Decoders: language models that predict the next token."""

from __future__ import annotations

from typing import Any

from autopar.zoo.architecture import Architecture

WIDTHS: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 24,
    "max_position_embeddings": 1024,
}
GROUPED: dict[str, Any] = {
    **WIDTHS,
    "num_key_value_heads": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 288,
    "n_embd": 192,
    "n_layer": 2,
    "n_head": 12,
    "n_positions": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_NEO: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 192,
    "num_layers": 2,
    "num_heads": 12,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 12,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOOM = {"vocab_size": 288, "hidden_size": 192, "n_layer": 2, "n_head": 12, "bos_token_id": 1, "eos_token_id": 2}
MPT = {"vocab_size": 288, "d_model": 192, "n_layers": 2, "n_heads": 12, "max_seq_len": 1024}
LATENT: dict[str, Any] = {  # keys and values from a narrow common vector (DeepSeek's multi-head latent attention)
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def decoder(name: str, fields: dict[str, Any], model: str | None = None, family: str = "decoder") -> Architecture:
    """``decoder("Llama", ...)``: LlamaConfig and LlamaForCausalLM."""
    return Architecture(family, f"{name}Config", model or f"{name}ForCausalLM", fields)


def _grouped(name: str, model: str | None = None, **fields: Any) -> Architecture:
    return decoder(name, {**GROUPED, **fields}, model)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _grouped("Llama"),
    "mistral": _grouped("Mistral", sliding_window=12),
    "qwen2": _grouped("Qwen2"),
    "qwen3": _grouped("Qwen3", head_dim=8),
    "gemma": _grouped("Gemma", head_dim=8),
    "gemma2": _grouped("Gemma2", head_dim=8, sliding_window=12),
    "gemma3": _grouped("Gemma3Text", "Gemma3ForCausalLM", head_dim=8, sliding_window=12, num_hidden_layers=6),
    "gpt2": decoder("GPT2", GPT2, "GPT2LMHeadModel"),
    "gpt_neo": decoder("GPTNeo", GPT_NEO),
    "gpt_neox": decoder("GPTNeoX", WIDTHS),
    "gptj": decoder("GPTJ", {**GPT2, "rotary_dim": 8}),
    "opt": decoder("OPT", {**WIDTHS, "ffn_dim": 384, "word_embed_proj_dim": 192, "pad_token_id": 1}),
    "phi": _grouped("Phi"),
    "phi3": _grouped("Phi3", sliding_window=12),
    "falcon": decoder("Falcon", WIDTHS),
    "falcon_new": decoder("Falcon", {**WIDTHS, "new_decoder_architecture": True, "num_kv_heads": 12, "alibi": False}),
    "bloom": decoder("Bloom", BLOOM),
    "mpt": decoder("Mpt", MPT),
    "starcoder2": _grouped("Starcoder2"),
    "stablelm": _grouped("StableLm"),
    "cohere": _grouped("Cohere"),
    "cohere2": _grouped("Cohere2", sliding_window=12),
    "olmo2": _grouped("Olmo2"),
    "olmo3": _grouped("Olmo3", sliding_window=12, num_hidden_layers=4),
    "granite": _grouped("Granite"),
    "smollm3": _grouped("SmolLM3"),
    "glm4": _grouped("Glm4", head_dim=8),
    "nemotron": _grouped("Nemotron", head_dim=8),
    "exaone4": _grouped("Exaone4", sliding_window=12),
    "helium": _grouped("Helium", head_dim=8),
    "persimmon": _grouped("Persimmon"),
    "codegen": decoder("CodeGen", {**GPT2, "n_ctx": 1024, "rotary_dim": 8}),
    "minicpm3": _grouped("MiniCPM3", q_lora_rank=48, **LATENT),
}
