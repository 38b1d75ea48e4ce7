"""A copy of a parallel module's model that knows nothing of ranks: without the hooks that autopar has put on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn


def forget_our_hooks(model: nn.Module) -> None:
    """Remove from the modules of ``model`` the hooks on state dicts that functions of autopar are."""
    for module in model.modules():
        for name in ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
            hooks = vars(module)[name]
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]


def _is_ours(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # as torch keeps those that get the module
    function = hook.func if isinstance(hook, partial) else hook
    return str(getattr(function, "__module__", "")).startswith("autopar.")


def fill(model: nn.Module, wholes: Mapping[str, Tensor]) -> None:
    """Put ``wholes``, by their names in the model, in place of its tensors; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, outline in table.items():
                if outline is not None:
                    whole = wholes[f"{path}.{key}" if path else key]
                    table[key] = made.setdefault(id(outline), _like(outline, whole))  # type: ignore[assignment]


def _like(outline: Tensor, whole: Tensor) -> Tensor:
    return nn.Parameter(whole, requires_grad=outline.requires_grad) if isinstance(outline, nn.Parameter) else whole
