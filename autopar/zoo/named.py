"""Models by name, as the command line takes them.

package.module:factory     a callable that returns a model, or (model, batch); in the working folder, or installed
llama, models.llama        a model of ours (``autopar.models``), its tiny preset
llama:llama_70b            another preset of it
hf:llama                   a small Hugging Face model with random weights (:mod:`autopar.zoo`)
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autopar import zoo
from autopar.models import __file__ as _OUR_MODELS

OURS = ("bert", "cnn", "dlrm", "gpt", "llama", "lstm", "mlp", "moe", "t5", "transformer", "unet", "vit")
ROWS = 12  # of a batch: 2, 3, 4, 6 and 12 ranks can share them
LARGE = 2 << 30  # bytes of parameters; presets above are built on the meta device, without weights


@dataclass(frozen=True)
class Example:
    """A model with the keyword arguments of one call. ``model`` may be on the meta device."""

    name: str
    model: nn.Module
    batch: dict[str, Any]

    @property
    def has_weights(self) -> bool:
        return not any(parameter.is_meta for parameter in self.model.parameters())


def named_model(
    name: str,
    config: Mapping[str, Any] | None = None,
    batch: int | None = None,
    length: int | None = None,
    seed: int = 0,
    ways: int = 1,
) -> Example:
    """The model called ``name`` and an example batch.

    ``config`` overrides fields of its config. ``seed`` is that of the weights and of the batch. The number of rows of a
    preset's batch is a multiple of ``ways`` unless ``batch`` gives it.

    Raises ValueError, with what is known, for a name that leads to no model or sizes that do not fit it.
    """
    overrides = dict(config or {})
    rows = batch or rows_for(ways)
    if name.startswith("hf:"):
        return _hugging_face(name, overrides, rows, length, seed)
    path, _, target = name.partition(":")
    module = _ours(path) or _imported(path, name)
    presets = getattr(module, "PRESETS", {})
    if hasattr(module, "build") and (not target or target in presets):
        return _preset(name, module, target or next(iter(presets)), overrides, (rows, length, seed))
    if not target:
        raise ValueError(f"'{name}': say which callable of {path} makes the model, as {path}:factory")
    return _made(name, module, target, {**overrides, **_given(batch=batch, length=length)}, seed)


def rows_for(ways: int) -> int:
    """The usual number of rows of a batch, or the next number that divides by ``ways``."""
    return -(-ROWS // ways) * ways


# ---------------------------------------------------------------- the three kinds


def _hugging_face(name: str, overrides: dict[str, Any], batch: int, length: int | None, seed: int) -> Example:
    known = zoo.architecture(name.removeprefix("hf:"))
    if length is not None and not known.has_length:
        raise ValueError(f"{name} takes images: there is no length")
    config = known.config_of(overrides)
    model = _built(lambda: known.build(config), seed)
    return Example(name, model, known.example_batch(config, batch, length, seed))


def _preset(
    name: str,
    module: ModuleType,
    preset: str,
    overrides: dict[str, Any],
    sizes: tuple[int, int | None, int],
) -> Example:
    known = {field.name for field in fields(module.PRESETS[preset])}
    for key in overrides:
        if key not in known:
            raise ValueError(f"the config of {module.__name__} has no field '{key}'; it has {', '.join(sorted(known))}")
    batch, length, seed = sizes
    model = _built(lambda: module.build(preset, **overrides), seed)
    return Example(name, model, module.example_batch(model, batch, length, seed))


def _made(name: str, module: ModuleType, target: str, wanted: dict[str, Any], seed: int) -> Example:
    """The result of the user's own factory. ``wanted``: arguments for it, as far as it takes them."""
    factory = getattr(module, target, None)
    if not callable(factory):
        have = sorted(getattr(module, "PRESETS", {})) or sorted(n for n in vars(module) if not n.startswith("_"))
        raise ValueError(f"'{name}': {module.__name__} has no '{target}'; it has {', '.join(have[:20])}")
    refused = [key for key in wanted if not _takes(factory, key)]
    if refused:
        raise ValueError(f"{name} takes no argument '{refused[0]}': {target}{inspect.signature(factory)}")
    torch.manual_seed(seed)
    made = factory(**wanted)
    model, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned {type(model).__name__}, not a model or (model, batch)")
    if batch is None and hasattr(module, "example_batch"):
        batch = module.example_batch(model)
    if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
        raise ValueError(
            f"{name} gives no batch to trace the model with\n"
            f"Way out: return (model, batch) from {target}, where model(**batch) is one call of it."
        )
    return Example(name, model, dict(batch))


def _built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model; a model with many weights is built without them, on the meta device."""
    with torch.device("meta"):
        outline = build()
    if sum(parameter.numel() * parameter.element_size() for parameter in outline.parameters()) > LARGE:
        return outline
    torch.manual_seed(seed)
    return build()


def _ours(path: str) -> ModuleType | None:
    """The module of a model of ours; a folder ``models`` of the user goes before our older name ``models.llama``."""
    folder, _, model = path.rpartition(".")
    if model not in OURS or folder not in ("", "models", "autopar.models"):
        return None
    if folder == "models" and _found_here(path):
        return None
    return importlib.import_module(f"autopar.models.{model}")


def _found_here(path: str) -> bool:
    """Whether the working folder has the module ``path``, unless it is a folder of autopar's sources."""
    file = Path(*path.split("."))
    found = [place for place in (file.with_suffix(".py"), file / "__init__.py") if place.is_file()]
    return bool(found) and not found[0].samefile(Path(_OUR_MODELS).parent / found[0].name)


def _imported(path: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(
            f"'{name}' is no name of a model: a path of Python modules is wanted, as they are imported\n"
            f"Way out: package.module:factory, one of {', '.join(OURS)}, or hf:ARCHITECTURE (hf:llama, ...)."
        )
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise ValueError(f"'{name}': importing {path} failed: {error}") from error
        raise ValueError(
            f"there is no model '{name}': {error}\n"
            f"Way out: package.module:factory, one of {', '.join(OURS)}, or hf:ARCHITECTURE (hf:llama, ...)."
        ) from None


def _given(**values: int | None) -> dict[str, int]:
    return {key: value for key, value in values.items() if value is not None}


def _takes(factory: Callable[..., Any], key: str) -> bool:
    parameters = inspect.signature(factory).parameters
    return key in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
