"""Models of which only ``config.json`` is there: a folder, or an id of the Hugging Face Hub that is in the cache.

No weights are read: the class that the config names is built with random ones, or on the meta device where it is large.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.errors import near_names
from autopar.zoo.architecture import transformers_library
from autopar.zoo.batches import Batch
from autopar.zoo.tasks import Task, task_named, task_of_class, tasks_of

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")  # pickles, which are refused when read
LENGTH = 128  # tokens in a row, if the model takes as many
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


@dataclass(frozen=True)
class HubModel:
    """A config with the task that its model is for."""

    name: str
    config: Any
    task: Task

    def build(self) -> nn.Module:
        auto = getattr(transformers_library(), self.task.auto)
        model: nn.Module = auto.from_config(self.config)
        return model.train()

    def batch(self, rows: int, length: int | None, seed: int) -> Batch:
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(seed)
            return self.task.batch(self.config, rows, length or self._length(), generator)

    def _length(self) -> int:
        text = self.config.get_text_config()
        return int(min([LENGTH, *(getattr(text, name, None) or math.inf for name in POSITIONS)]))

    @property
    def words(self) -> str:
        """``LlamaForCausalLM of folder/config.json, task causal-lm``."""
        return f"{(self._saved or self._classes)[0]} of {self.name}, task {self.task.name}"

    @property
    def is_saved_class(self) -> bool:
        """Whether the config names the class that is built, so that its files have all of its tensors."""
        return bool(self._saved)

    @property
    def _classes(self) -> tuple[str, ...]:
        return self.task.classes.get(self.config.model_type, (self.config.model_type,))

    @property
    def _saved(self) -> list[str]:
        return [name for name in getattr(self.config, "architectures", None) or () if name in self._classes]


def is_folder(name: str) -> bool:
    return (Path(name) / CONFIG).is_file()


def weights_folder(name: str) -> Path | None:
    """The folder with the weights of a folder or an id: itself, or that of the cache; None where only a config is."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(name, CONFIG)
        except (ImportError, ValueError):  # no such package, no name of a repository
            return None
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    return folder if any(any(folder.glob(pattern)) for pattern in WEIGHTS) else None


def may_be_id(name: str) -> bool:
    """Whether ``name`` could be an id of the Hub: ``owner/model``."""
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))


def hub_model(name: str, task: str | None, overrides: Mapping[str, Any]) -> HubModel:
    """The model of a folder or an id. Raises ValueError where its config cannot be read or does not say its task."""
    config = _config(name)
    _override(config, overrides)
    chosen = task_named(task) if task is not None else _task_of(name, config)
    if config.model_type not in chosen.classes:
        there = ", ".join(each.name for each in tasks_of(config))
        raise ValueError(f"--task {chosen.name}: transformers has no such {config.model_type}\nWay out: --task {there}")
    if getattr(config, "use_cache", False):
        config.use_cache = False  # of inference; training has none
    if getattr(config, "pad_token_id", None) is None and chosen.name == "seq-classification":
        config.pad_token_id = 0  # without one only batches of one row are taken
    return HubModel(name, config, chosen)


def _config(name: str) -> Any:
    transformers = transformers_library()
    file = Path(name) / CONFIG
    if file.is_file():
        _refuse_remote_code(name, file)
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:300]
        if file.is_file():
            raise ValueError(f"{file} cannot be read: {said}\nWay out: a config that transformers knows.") from error
        raise ValueError(
            f"'{name}' is neither a folder with {CONFIG} nor a model in the cache of the Hugging Face Hub\n"
            f"Way out: hf download {name} {CONFIG}, or a folder with that file."
        ) from error


def _refuse_remote_code(name: str, file: Path) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}\nWay out: {CONFIG} as a model has saved it.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no config: it holds no table\nWay out: {CONFIG} as a model has saved it.")
    if "auto_map" in found and "model_type" not in found:
        raise ValueError(
            f"{name} brings its own code, which autopar does not run\n"
            "Way out: import its class in a file of yours, and give FILE.py:FACTORY as MODEL."
        )


def _override(config: Any, overrides: Mapping[str, Any]) -> None:
    """Set fields of the config, or of that of its text model. Raises ValueError for one that neither has."""
    text = config.get_text_config()
    for key, value in overrides.items():
        part = next((part for part in (config, text) if hasattr(part, key)), None)
        if part is None:
            near = near_names(key, {**text.to_dict(), **config.to_dict()})
            raise ValueError(f"{type(config).__name__} has no field '{key}'{near}\nWay out: a field of {CONFIG}.")
        setattr(part, key, getattr(torch, str(value), value) if key in ("dtype", "torch_dtype") else value)


def _task_of(name: str, config: Any) -> Task:
    classes = list(getattr(config, "architectures", None) or ())
    found = next(filter(None, map(task_of_class, classes)), None)
    if found is not None:
        return found
    there = list(tasks_of(config))
    if len(there) == 1:
        return there[0]
    said = f"names {', '.join(classes)}" if classes else "names no architecture"
    if not there:
        raise ValueError(
            f"{name}: its config {said}, and transformers has no model of type {config.model_type} for a task\n"
            "Way out: a factory in a file of yours, FILE.py:FACTORY."
        )
    raise ValueError(f"{name}: its config {said}\nWay out: --task {' | '.join(task.name for task in there)}")
