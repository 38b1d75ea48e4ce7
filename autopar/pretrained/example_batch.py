"""A batch like those of a Hugging Face model's task, to make a program with before there is one of the user's."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from autopar.mesh import Mesh
from autopar.plan import Plan

LENGTH = 512  # tokens of a row, where the model has positions for so many
ENDINGS = {  # of a class's name -> whether each token has a label, or each row
    "ForCausalLM": True,
    "LMHeadModel": True,
    "ForMaskedLM": True,
    "ForConditionalGeneration": True,
    "ForTokenClassification": True,
    "ForSequenceClassification": False,
}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")  # how configs call it


def example_batch(model: nn.Module, mesh: Mesh, plan: Plan) -> dict[str, Tensor]:
    """``input_ids`` [rows, tokens] and ``labels`` (int64) of a model of text, which may take other inputs too.

    The number of rows and that of tokens divide by all axes of ``mesh`` and by the microbatches.
    Raises ValueError for a model of which it is not known what it takes.
    """
    of_tokens = next((kind for ending, kind in ENDINGS.items() if type(model).__name__.endswith(ending)), None)
    if of_tokens is None or not {"input_ids", "labels"} <= set(inspect.signature(model.forward).parameters):
        raise ValueError(
            f"it is not known what a batch of {type(model).__name__} is\n"
            "Way out: example_inputs=batch, the arguments by name of a call like those that follow."
        )
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows, tokens = mesh.world_size * (plan.microbatches or 1), _length(text, mesh)
    kinds = min(getattr(text, "vocab_size", None) or 2, 100)
    ids = (torch.arange(tokens) % kinds).repeat(rows, 1)
    return {"input_ids": ids, "labels": ids.clone() if of_tokens else torch.zeros(rows, dtype=torch.int64)}


def _length(text: Any, mesh: Mesh) -> int:
    """At most LENGTH tokens, and as many as the config ``text`` has positions; a multiple of what axes may need."""
    limits = [getattr(text, key, None) for key in POSITIONS]
    limit = next((found for found in limits if isinstance(found, int)), LENGTH)
    ways = 2 * mesh.world_size
    return max(min(LENGTH, limit) // ways * ways, ways)
