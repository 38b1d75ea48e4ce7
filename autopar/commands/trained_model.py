"""Whether a model can be trained on given tokens by ``autopar train``."""

from __future__ import annotations

import inspect

from torch import nn

from autopar.data.token_stream import TokenStream

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
    refuse_without_weights(name, model)
    stream.limit = vocabulary
    if stream.is_separate:
        _refuse_joined(name, model)


def refuse_without_weights(name: str, model: nn.Module) -> None:
    """Raise ValueError where ``model`` is on the meta device."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{name} is too large to be trained from random weights here\nWay out: --config layers=2")


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
