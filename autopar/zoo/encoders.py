"""Encoders of text, and encoder-decoders of text and of speech."""

from __future__ import annotations

from typing import Any

from autopar.zoo import batches
from autopar.zoo.architecture import Architecture, MakeBatch
from autopar.zoo.decoders import WIDTHS

DISTILBERT: dict[str, Any] = {
    "vocab_size": 288,
    "dim": 192,
    "hidden_dim": 384,
    "n_layers": 2,
    "n_heads": 12,
    "max_position_embeddings": 1024,
}
DEBERTA: dict[str, Any] = {
    **WIDTHS,
    "num_attention_heads": 12,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 12,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
XLNET = {"vocab_size": 288, "d_model": 192, "n_layer": 2, "n_head": 12, "d_inner": 384}
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
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
WHISPER: dict[str, Any] = {
    **{key: size for key, size in BART.items() if key != "max_position_embeddings"},
    "num_mel_bins": 24,
    "max_source_positions": 24,
    "max_target_positions": 1024,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def _encoder(name: str, task: str = "MaskedLM", batch: MakeBatch = batches.masked, **fields: Any) -> Architecture:
    return Architecture("encoder", f"{name}Config", f"{name}For{task}", fields, batch)


def _pair(name: str, fields: dict[str, Any]) -> Architecture:
    model = f"{name}ForConditionalGeneration"
    return Architecture("encoder-decoder", f"{name}Config", model, fields, batches.pair)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": _encoder("Bert", **WIDTHS),
    "roberta": _encoder("Roberta", **WIDTHS, pad_token_id=1),
    "distilbert": _encoder("DistilBert", **DISTILBERT),
    "electra": _encoder("Electra", "SequenceClassification", batches.sentences, **WIDTHS, embedding_size=192),
    "albert": _encoder("Albert", **WIDTHS, embedding_size=96),
    "deberta_v2": _encoder("DebertaV2", **DEBERTA),
    "modernbert": _encoder("ModernBert", **WIDTHS, local_attention=12, pad_token_id=0, cls_token_id=1, sep_token_id=2),
    "xlnet": Architecture("encoder", "XLNetConfig", "XLNetLMHeadModel", XLNET),
    "t5": _pair("T5", T5),
    "bart": _pair("Bart", BART),
    "mbart": _pair("MBart", BART),
    "pegasus": _pair("Pegasus", BART),
    "whisper": Architecture("audio", "WhisperConfig", "WhisperForConditionalGeneration", WHISPER, batches.audio),
}
