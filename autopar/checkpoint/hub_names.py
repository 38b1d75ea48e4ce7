"""The door to ``transformers``: the names that it gives to tensors of files while it loads, and back while it saves.

Models of other libraries, and of versions before 5, have one name for a tensor, in files too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

FORMER_BUFFERS = ("rotary_emb.inv_freq", "position_ids")  # those that older files have at other places


def reverted(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` of the ordinary module ``model`` as ``save_pretrained`` would write it."""
    if not is_pretrained(model):
        return state
    from transformers.core_model_loading import revert_weight_conversion

    found: Mapping[str, Tensor] = revert_weight_conversion(model, dict(state))
    return found


@dataclass(frozen=True)
class Renamed:
    """What becomes of names in files: the model's name, or ``computed``: transformers makes other tensors of them."""

    names: dict[str, str]
    computed: tuple[str, ...]


def renamed(model: nn.Module, stored: Iterable[str], state: Mapping[str, Tensor]) -> Renamed:
    """The names in ``state`` (the model's own) for those of ``stored``, as ``from_pretrained`` finds them.

    So names of older versions (``gamma`` and ``beta`` of a norm) are known.
    """
    found, computed = dict[str, str](), list[str]()
    if not is_pretrained(model):
        return Renamed(found, ())
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    for name in stored:
        own, pattern = rename_source_key(name, renamings, converters, getattr(model, "base_model_prefix", ""), state)
        if own in state and pattern is None:
            found[name] = own
        elif own in state:
            computed.append(name)
    return Renamed(found, tuple(computed))


def without_ignored(model: nn.Module, missing: Iterable[str], unused: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names of both lists without those that the model's class says may be missing, or unused."""
    lacks = _pattern(getattr(model, "_keys_to_ignore_on_load_missing", None))
    buffers = [name for name, _ in model.named_buffers()]
    former = [end for end in FORMER_BUFFERS if any(buffer.endswith(end) for buffer in buffers)]
    known = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    more = _pattern([*known, *(rf"(^|\.){re.escape(end)}$" for end in former)])
    return [name for name in missing if not lacks(name)], [name for name in unused if not more(name)]


def not_written(model: nn.Module) -> set[str]:
    """The names of tensors that ``save_pretrained`` leaves out of files."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def configs_of(model: nn.Module) -> dict[str, Any] | None:
    """The configs of ``model`` by the names of their files, in plain values; None for a model of another library."""
    if not is_pretrained(model):
        return None
    found: dict[str, Any] = {}
    for file, name in (("config.json", "config"), ("generation_config.json", "generation_config")):
        config: Any = getattr(model, name, None)
        if config is not None:
            found[file] = json.loads(config.to_json_string())
    found["config.json"]["architectures"] = [type(model).__name__]
    return found


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is one of ``transformers``, of a version with conversions."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion  # noqa: F401
    except ImportError:
        return False
    return isinstance(model, PreTrainedModel)


def _pattern(texts: Any) -> Any:
    joined = "|".join(f"({text})" for text in texts or ())
    return re.compile(joined).search if joined else lambda name: None
