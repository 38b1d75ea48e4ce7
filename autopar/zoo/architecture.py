"""One architecture of the zoo, and how it becomes a small model with random weights and a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar.errors import near_names
from autopar.zoo import batches
from autopar.zoo.batches import Batch

LENGTH = 24  # tokens in a row

MakeBatch = Callable[[Any, int, int, torch.Generator], Batch]


@dataclass(frozen=True)
class Architecture:
    """Class names in ``transformers``, the fields of the config, and the form of a batch.

    A field that is a mapping is the config of a part of the model (CLIP's text and vision towers). ``draws``: the model
    draws random numbers in training even without dropout, which no other program can repeat, so it is built in
    evaluation mode.
    """

    family: str
    config: str
    model: str
    fields: Mapping[str, Any]
    batch: MakeBatch = batches.causal
    draws: bool = False

    @property
    def has_length(self) -> bool:
        return self.batch is not batches.images

    def config_of(self, overrides: Mapping[str, Any]) -> Any:
        """The config with ``overrides``; dropout is off unless they say otherwise.

        Raises ValueError for a field that the config class does not have, and where transformers is not installed.
        """
        kind = getattr(transformers_library(), self.config)
        known, renamed = kind(), kind.attribute_map
        for key in overrides:
            if not hasattr(known, key):
                near = near_names(key, known.to_dict())
                raise ValueError(f"{kind.__name__} has no field '{key}'{near}\nWay out: a field of that config.")
        fields = {renamed.get(key, key): value for key, value in self.fields.items()}
        fields |= {renamed.get(key, key): value for key, value in overrides.items()}
        config = kind(**{key: dict(value) if isinstance(value, Mapping) else value for key, value in fields.items()})
        for part in (config, *(value for value in vars(config).values() if _is_config(value))):
            _calm(part, overrides)
        return config

    def build(self, config: Any) -> nn.Module:
        """The model for ``config``, in training mode (in evaluation mode with ``draws``)."""
        model: nn.Module = getattr(transformers_library(), self.model)(config)
        return model.train(not self.draws)

    def example_batch(self, config: Any, rows: int, length: int | None = None, seed: int = 0) -> Batch:
        """Random inputs and labels: keyword arguments of the model."""
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(seed)
            return self.batch(config, rows, length or LENGTH, generator)


def _calm(config: Any, overrides: Mapping[str, Any]) -> None:
    """``config`` without dropout, without jitter, and without a cache in the output, which training does not use."""
    for key, value in vars(config).items():
        if ("drop" in key or "jitter" in key) and isinstance(value, float) and key not in overrides:
            setattr(config, key, 0.0)
    if hasattr(config, "use_cache"):
        config.use_cache = False


def _is_config(value: Any) -> bool:
    return hasattr(value, "attribute_map") and hasattr(value, "to_dict")


def transformers_library() -> Any:
    """The module ``transformers``. Raises ValueError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "models of Hugging Face need the transformers library\nWay out: pip install 'autopar[hf]'"
        ) from None
    return transformers
