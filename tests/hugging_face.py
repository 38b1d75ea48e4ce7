"""Small Hugging Face models with random weights, each with one batch, and their check against a graph of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.frontend.numerics import gradient_error, input_tensors, promote_float32, run_graph
from autopar.ir.program import Program
from autopar.ir.signature import restore_output

transformers = pytest.importorskip("transformers")

Batch = dict[str, Tensor]
BATCH, LENGTH, VOCABULARY = 2, 16, 256

DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, "attention_dropout": 0.0,
}  # fmt: skip
GPT2 = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "use_cache": False}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {key: DECODER[key] for key in list(DECODER)[:7] if key != "num_key_value_heads"}
BERT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0, "use_cache": False}
BART = {"vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
BART |= {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "use_cache": False}
BART |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
VIT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VIT |= {"image_size": 32, "patch_size": 8, "num_labels": 2}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_labels": 2}


def tokens() -> Batch:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    labels = ids.clone()
    labels[0, :5] = -100  # unequal numbers of labels that count
    return {"input_ids": ids, "labels": labels}


def images() -> Batch:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(0, 2, (BATCH,))}


MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[], Batch]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, tokens),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER | {"sliding_window": 8}, tokens),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", DECODER | {"sliding_window": 8, "head_dim": 16}, tokens),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2, tokens),
    "bert": ("BertConfig", "BertForMaskedLM", BERT, tokens),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, tokens),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART, tokens),
    "vit": ("ViTConfig", "ViTForImageClassification", VIT, images),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", RESNET, images),
}


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tuple[nn.Module, Batch]:
    config, model, settings, batch = MODELS[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**settings | changes)).to(dtype).train()
    inputs = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in batch().items()}
    return built, inputs


def errors(program: Program, model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Error of the loss and the largest of a gradient, of the program's whole graph against the model, in float64."""
    parameters = dict(model.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with promote_float32():
        found = restore_output(program, run_graph(program.graph, input_tensors(program, model, (), batch)))
        expected = torch.func.functional_call(model, buffers, (), batch)
    assert type(found) is type(expected) and list(found) == list(expected)

    def gradients(loss: Tensor) -> dict[str, Tensor | None]:
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)))

    gradient_errors = gradient_error(gradients(found.loss), gradients(expected.loss))
    return float((found.loss - expected.loss).detach().abs()), max(gradient_errors.values())
