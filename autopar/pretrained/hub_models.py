"""The other door to ``transformers``: from a folder, or the Hub, to a model on the meta device.

``autopar/checkpoint/hub_names.py`` is the one for the names of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autopar.errors import CheckpointError, near_names
from autopar.zoo.tasks import task_named, tasks_of

WANTED = ("*.json", "model*.safetensors")  # of a repository of the Hub
CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"


def folder_of(folder_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or that of a repository of the Hub, from the cache or else from the network.

    Raises CheckpointError where there is none, or it has no config.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir():
        folder = _downloaded(str(folder_or_id), revision)
    if (folder / CONFIG).is_file():
        return folder
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"'{folder}' has an adapter of peft and no model\n"
            "Way out: merge it into its base first: AutoPeftModel.from_pretrained(...).merge_and_unload(), then\n"
            "save_pretrained(a new folder)."
        )
    raise CheckpointError(f"'{folder}' has no {CONFIG}\nWay out: a folder that save_pretrained wrote, or a Hub id.")


def _downloaded(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        way_out = "Way out: pip install 'autopar[hf]'."
        raise CheckpointError(f"there is no folder '{name}', and no huggingface_hub\n{way_out}") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except (ValueError, OSError) as problem:  # no such name, no such repository, no network
        raise CheckpointError(
            f"'{name}' is no folder, and no repository of the Hub that can be had: "
            f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]:.200}\n"
            f"Way out: the path of a folder with {CONFIG}, or hf download {name} where there is a network."
        ) from None


def meta_model(
    folder: Path,
    task: str | type | None,
    dtype: torch.dtype | None,
    changes: Mapping[str, Any] | None,
    trust_remote_code: bool,
) -> nn.Module:
    """The model of ``folder`` without weights, in evaluation mode as that of ``from_pretrained``.

    ``task``, ``dtype``, ``changes``: see :func:`autopar.pretrained.loading.from_pretrained`.
    Raises CheckpointError for a folder that does not say which model it has, and for quantised weights.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **(changes or {}))
    unknown = [name for name in changes or {} if not hasattr(config, name)]
    if unknown:
        near = near_names(unknown[0], [*config.to_dict(), "num_labels"])
        raise ValueError(f"{type(config).__name__} has no field '{unknown[0]}'{near}")
    refuse_quantised(folder, config)
    dtype = dtype or _as_dtype(getattr(config, "dtype", None))
    with torch.device("meta"):
        model: Any = _built(_class_of(folder, config, task), config, dtype, trust_remote_code)
        keep_in_float32(model, dtype)
    if (folder / GENERATION).is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    plain: nn.Module = model.eval()
    return plain


def settle_problem_type(model: nn.Module, batch: Any) -> None:
    """Say in the config of a classifier what its first call would write there, by the dtype of the labels."""
    config: Any = getattr(model, "config", None)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    classifies = type(model).__name__.endswith("Classification")
    if labels is None or not classifies or getattr(config, "problem_type", "") is not None:
        return
    if config.num_labels == 1:
        config.problem_type = "regression"
    else:
        is_class = labels.dtype in (torch.int64, torch.int32)
        config.problem_type = "single_label_classification" if is_class else "multi_label_classification"


def refuse_quantised(folder: Path, config: Any) -> None:
    """Raise CheckpointError where the weights in ``folder`` are quantised, as its config says."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    method = str(getattr(method, "value", method))
    raise CheckpointError(
        f"the weights in '{folder}' are quantised ({method}), which cannot be trained in parts\n"
        "Way out: once, with transformers: from_pretrained(..., quantization_config=its config(dequantize=True))\n"
        ".save_pretrained(a new folder); Mxfp4Config and FineGrainedFP8Config have that choice."
    )


def _class_of(folder: Path, config: Any, task: str | type | None) -> Any:
    import transformers

    if isinstance(task, type):
        return task
    if task is not None:
        return getattr(transformers, task_named(task).auto)
    names = list(getattr(config, "architectures", None) or ())
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    there = list(tasks_of(config))
    if found is None and len(there) == 1:
        return getattr(transformers, there[0].auto)
    if found is None:
        said = f"names {names[0]}, which this transformers does not have" if names else "has no 'architectures'"
        raise CheckpointError(
            f"which model is in '{folder}' is not clear: its {CONFIG} {said}\n"
            f"Way out: task=, one of {', '.join(one.name for one in there) or 'those of another model'}, or a class."
        )
    return found


def _built(cls: Any, config: Any, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """``cls`` is a class of models, or one of the classes that find a config's."""
    if hasattr(cls, "from_config"):
        return cls.from_config(config, dtype=dtype or torch.float32, trust_remote_code=trust_remote_code)
    if hasattr(cls, "_from_config"):
        return cls._from_config(config, dtype=dtype or torch.float32)
    raise ValueError(f"task={cls.__name__} is no class of transformers: autopar.parallelize takes any nn.Module")


def keep_in_float32(model: Any, dtype: torch.dtype | None) -> None:
    """Convert what ``from_pretrained`` keeps in float32 beside half precision, as the model's class says."""
    plan = model._get_dtype_plan(dtype) if dtype is not None and hasattr(model, "_get_dtype_plan") else {}
    for pattern, kept in plan.items():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if re.search(pattern.replace("*", ".*"), name):
                tensor.data = tensor.data.to(kept)


def _as_dtype(found: Any) -> torch.dtype | None:
    named = getattr(torch, found, None) if isinstance(found, str) else found
    return named if isinstance(named, torch.dtype) else None
