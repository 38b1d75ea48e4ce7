"""Adapters of ``peft`` in a parallel module, read from the files that ``PeftModel.save_pretrained`` has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.errors import CheckpointError
from autopar.module import ParallelModule, held_by

FILES = ("adapter_model.safetensors", "adapter_model.bin")
DEFAULT = "default"  # the adapter whose files are in the directory itself; others have folders


def has_adapters(plain: nn.Module) -> bool:
    """Whether ``plain`` is a model of ``peft``."""
    return bool(getattr(plain, "peft_config", None))


def load_adapters(model: ParallelModule, directory: str | Path) -> None:
    """The adapters of ``model`` as they are in ``directory``; on all ranks. Raises CheckpointError for names."""
    from peft.utils.save_and_load import load_peft_weights

    plain: Any = held_by(model).model
    for adapter in plain.peft_config:
        folder = Path(directory) if adapter == DEFAULT else Path(directory) / adapter
        if plain.peft_config[adapter].is_prompt_learning or not any((folder / name).is_file() for name in FILES):
            raise CheckpointError(
                f"adapter {adapter!r} cannot be read from {folder}: here are read {' or '.join(FILES)}, and no "
                "prompts\nWay out: peft.PeftModel.from_pretrained(plain, ...), then autopar.parallelize(that, mesh)."
            )
        stored = load_peft_weights(str(folder), device="cpu")
        names = _names_of_entries(plain, model, adapter)
        if stored.keys() - names.keys() or names.keys() - stored.keys():
            differ = ", ".join(sorted(stored.keys() ^ names.keys())[:4])
            raise CheckpointError(
                f"the files of adapter {adapter!r} in {folder} are of other modules than the model has: {differ}\n"
                "Way out: the peft.LoraConfig with which they were trained."
            )
        model.load_state_dict({names[entry]: value for entry, value in stored.items()}, strict=False)


def _names_of_entries(plain: Any, model: ParallelModule, adapter: str) -> dict[str, str]:
    """Entry of a file of ``adapter`` -> the name of that parameter in ``model``."""
    from peft import get_peft_model_state_dict

    names = list(model.state_dict())
    numbers = {name: torch.tensor(place) for place, name in enumerate(names)}
    entries = get_peft_model_state_dict(plain, state_dict=numbers, adapter_name=adapter)
    return {entry: names[int(place)] for entry, place in entries.items()}
