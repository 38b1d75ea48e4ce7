"""State-space models: a recurrent scan in place of attention."""

from __future__ import annotations

from typing import Any

from autopar.zoo.architecture import Architecture
from autopar.zoo.decoders import decoder

MAMBA: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA2 = {**MAMBA, "num_heads": 12, "head_dim": 16, "chunk_size": 8, "n_groups": 1}

ARCHITECTURES: dict[str, Architecture] = {
    "mamba": decoder("Mamba", MAMBA, family="state-space"),
    "mamba2": decoder("Mamba2", MAMBA2, family="state-space"),
    "falcon_mamba": decoder("FalconMamba", MAMBA, family="state-space"),
}
