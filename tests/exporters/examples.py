"""The models that are exported, in float64, each with a batch of four rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import hugging_face

transformers = pytest.importorskip("transformers")
NAMES = ("llama", "gpt2", "bert", "vit", "t5", "mixtral")
MESHES: tuple[dict[str, int], ...] = ({"tp": 2}, {"dp": 2, "tp": 2}, {"pp": 2, "tp": 2}, {"sp": 2}, {"ep": 2})
MIXTRAL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "use_cache": False,
}  # fmt: skip


def fits(name: str, axes: dict[str, int]) -> bool:
    """Images have no sequence, and only mixtral has experts."""
    return not (name == "vit" and "sp" in axes) and (name == "mixtral" or "ep" not in axes)


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    """In evaluation mode: what is exported is inference."""
    if name == "mixtral":
        torch.manual_seed(0)
        model: nn.Module = transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)).to(dtype)
        batch = hugging_face.tokens()
    else:
        model, batch = hugging_face.build(name, dtype)
    return model.eval(), {key: torch.cat([tensor, tensor.flip(0)]) for key, tensor in batch.items()}
