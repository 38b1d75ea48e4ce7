"""State dicts of a parallel module are in the model's order, whatever order its parameters are stored in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.weights.stored import Stored, in_model_order, in_stored_order, is_in_model_order

_MARK = "autopar_translates"  # on hooks of this file


def translate_state(module: nn.Module, forms: dict[str, Stored], announce: Callable[[str], None]) -> None:
    """Make state dicts of ``module`` have the model's order; ``forms`` are those of its own tensors.

    ``announce`` is called before ranks communicate for it.
    """

    def saving(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key, form in forms.items():
            value = state.get(prefix + key)
            if isinstance(value, DTensor):
                if not is_in_model_order(form):
                    announce("state_dict()")
                state[prefix + key] = in_model_order(value, form)

    def loading(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in forms:
            value, held = state.get(prefix + key), module._parameters.get(key, module._buffers.get(key))
            if isinstance(value, Tensor) and isinstance(held, DTensor) and value.shape == held.shape:
                state[prefix + key] = in_stored_order(value, held)

    for hook in (saving, loading):
        vars(hook)[_MARK] = True
    module.register_state_dict_post_hook(saving)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(loading)  # type: ignore[no-untyped-call]


def forget_translation(module: nn.Module) -> None:
    """Remove the hooks that a copy of a module has of :func:`translate_state`."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if hasattr(getattr(hook, "hook", hook), _MARK):
                del hooks[key]
