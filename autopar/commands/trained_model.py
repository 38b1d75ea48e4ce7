"""Whether a model can be trained on given tokens by ``autopar train``."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from autopar.data.token_stream import TokenStream
from autopar.zoo.named import Example

POSITIONS = "position_ids"


def refuse_model(name: str, model: nn.Module, stream: TokenStream) -> None:
    """Raise ValueError where ``model``, called ``name``, cannot be trained on the batches of ``stream``."""
    sizes, tokens = getattr(model, "config", None), stream.tokens
    vocabulary = getattr(sizes, "vocab_size", getattr(sizes, "vocab", None))
    if not isinstance(vocabulary, int):
        raise ValueError(
            f"{name} has no vocabulary, and text is for language models, which take input_ids and labels\n"
            "Way out: --data FILE.py:LOADER, a function that returns batches for any model; or tiny:llama."
        )
    if vocabulary < tokens.vocabulary:
        key = "vocab_size" if hasattr(sizes, "vocab_size") else "vocab"
        enough = -(-tokens.vocabulary // 32) * 32 + 32
        raise ValueError(
            f"{name} has a vocabulary of {vocabulary}, and {tokens.unit} need {tokens.vocabulary}\n"
            f"Way out: --config {key}={enough}"
        )
    stream.limit = vocabulary
    if stream.is_separate:
        _refuse_joined(name, model)


def refuse_without_weights(example: Example, *, outline: bool) -> None:
    """Raise ValueError where the model has no weights, and gets none from files. An ``outline`` has none as yet."""
    if example.files is not None or example.has_weights or (outline and not example.is_large):
        return
    count = sum(parameter.numel() for parameter in example.model.parameters())
    field = _layers_field(example.model)
    raise ValueError(
        f"{example.name} has {count / 1e9:.3g} billion parameters and no weights in files; "
        "that is too large to be trained from random weights here\n"
        f"Way out: {f'--config {field}=2, or ' if field else ''}a folder, or an id, with weights."
    )


def _layers_field(model: nn.Module) -> str | None:
    """The field of the model's config that has the number of its layers."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    usual = "num_hidden_layers"
    field = getattr(text, "attribute_map", {}).get(usual, usual)
    return next((name for name in (field, "layers") if hasattr(text, name)), None)


def _refuse_joined(name: str, model: nn.Module) -> None:
    """Raise ValueError where nothing tells ``model`` which tokens are of one document."""
    if POSITIONS not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"--documents separate: {name} takes no {POSITIONS}, by which documents are told apart\n"
            "Way out: --documents joined, or a model of Hugging Face's."
        )
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False  # with a cache it takes the positions for those of one text
