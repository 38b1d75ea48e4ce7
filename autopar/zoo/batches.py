"""Random batches of the form that Hugging Face models train on; the rows of tokens count unequal numbers of labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

Batch = dict[str, Any]


def causal(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Tokens and labels (B, T); row i ignores its first 1 + i labels (modulo T/2)."""
    input_ids = _tokens(config, rows, length, generator)
    ignored = 1 + torch.arange(rows) % max(1, length // 2)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(torch.arange(length) < ignored[:, None], -100)}


def masked(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Tokens (B, T) of which row i hides every 7th and its first i (modulo T/2); only hidden ones have labels."""
    tokens = _tokens(config, rows, length, generator)
    places, extra = torch.arange(length), torch.arange(rows)[:, None] % max(1, length // 2)
    hidden = (places % 7 == 0) | (places < extra)
    return {"input_ids": tokens.masked_fill(hidden, 2), "labels": tokens.masked_fill(~hidden, -100)}


def pair(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Source (B, T) and labels (B, T/2) of an encoder-decoder; row i ignores its last i labels (modulo T/2)."""
    source = _tokens(config, rows, length, generator)
    return {"input_ids": source, "labels": _answers(config, rows, length, generator)}


def audio(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Mel features (B, bins, 2 S) for S source positions, and labels (B, T/2) as of :func:`pair`."""
    shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
    features = torch.randn(shape, generator=generator)
    return {"input_features": features, "labels": _answers(config, rows, length, generator)}


def sentences(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Tokens (B, T) and a class for each row (B)."""
    return {"input_ids": _tokens(config, rows, length, generator), "labels": _classes(config, rows, generator)}


def classified_tokens(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Tokens (B, T), each with a class (B, T); row i ignores its first i (modulo T/2)."""
    ignored = torch.arange(length) < torch.arange(rows)[:, None] % max(1, length // 2)
    classes = torch.randint(config.num_labels, (rows, length), generator=generator)
    return {"input_ids": _tokens(config, rows, length, generator), "labels": classes.masked_fill(ignored, -100)}


def spans(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Tokens (B, T) with the first and last position (B) of an answer."""
    starts = torch.randint(length, (rows,), generator=generator)
    ends = torch.minimum(starts + torch.randint(length, (rows,), generator=generator), torch.tensor(length - 1))
    tokens = _tokens(config, rows, length, generator)
    return {"input_ids": tokens, "start_positions": starts, "end_positions": ends}


def several_choices(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Tokens (B, 4, T) of four answers, and the right one (B)."""
    choices = 4
    tokens = _tokens(config, rows * choices, length, generator).view(rows, choices, length)
    return {"input_ids": tokens, "labels": torch.randint(choices, (rows,), generator=generator)}


def features(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Tokens (B, T); of a model of images, images (B, channels, size, size). There are no labels."""
    if hasattr(config, "num_channels") and not hasattr(_text_of(config), "vocab_size"):
        return {"pixel_values": images(config, rows, length, generator)["pixel_values"]}
    tokens = _tokens(config, rows, length, generator)
    more = {"decoder_input_ids": tokens.clone()} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": tokens, **more}


def images(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Images (B, channels, size, size) and classes (B); there is no length."""
    size = getattr(config, "image_size", 0) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn((rows, config.num_channels, height, width), generator=generator)
    return {"pixel_values": pixels, "labels": _classes(config, rows, generator)}


def captions(config: Any, rows: int, length: int, generator: Generator) -> Batch:
    """Images (B, channels, size, size) with a text (B, T) each, for a contrastive loss."""
    vision = config.vision_config
    pixels = torch.randn((rows, vision.num_channels, vision.image_size, vision.image_size), generator=generator)
    tokens = _tokens(config.text_config, rows, length, generator)
    return {"input_ids": tokens, "pixel_values": pixels, "return_loss": True}


def _tokens(config: Any, rows: int, length: int, generator: Generator) -> Tensor:
    size = _text_of(config).vocab_size
    return torch.randint(min(3, size - 1), size, (rows, length), generator=generator)  # 0, 1, 2: padding, start, end


def _text_of(config: Any) -> Any:
    """The config of the part of a model that reads tokens."""
    return (
        config if hasattr(config, "vocab_size") or not hasattr(config, "get_text_config") else config.get_text_config()
    )


def _answers(config: Any, rows: int, length: int, generator: Generator) -> Tensor:
    target = _tokens(config, rows, max(1, length // 2), generator)
    kept = target.shape[1] - torch.arange(rows)[:, None] % target.shape[1]
    return target.masked_fill(torch.arange(target.shape[1]) >= kept, -100)


def _classes(config: Any, rows: int, generator: Generator) -> Tensor:
    return torch.randint(config.num_labels, (rows,), generator=generator)
