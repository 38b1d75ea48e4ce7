"""State dicts of a parallel module are in the model's order, whatever order its parameters are stored in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.dtensors.dtensor import HELD, local_of, of_local, parameter_of, spec_of
from autopar.weights.stored import Stored, in_model_order, in_stored_order, is_in_model_order

ASSIGN = "assign_to_params_buffers"  # of what torch passes on to a module: load_state_dict(assign=True)
_ASSIGNED = "autopar_assigned"  # on a parameter that was replaced: the memory of what was given, what replaced it
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

    def loading(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
        for key in forms:
            value, held = state.get(prefix + key), module._parameters.get(key, module._buffers.get(key))
            if isinstance(value, Tensor) and isinstance(held, DTensor) and value.shape == held.shape:
                state[prefix + key] = found = in_stored_order(value, held)
                if metadata.get(ASSIGN) and isinstance(held, nn.Parameter):
                    state[prefix + key] = _assigned(module, key, found, value, metadata)

    for hook in (saving, loading):
        vars(hook)[_MARK] = True
    module.register_state_dict_post_hook(saving)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(loading)  # type: ignore[no-untyped-call]


def _assigned(module: nn.Module, key: str, value: DTensor, given: Tensor, metadata: Any) -> nn.Parameter:
    """The parameter with ``value`` that takes the place of the present one; it is one of the parallel module as well.

    ``given``: what ``value`` was made of. Tied parameters of which the same is given stay tied.
    """
    held: Any = module._parameters[key]
    memory = local_of(given).untyped_storage()
    before, made = vars(held).get(_ASSIGNED, (None, None))
    if before is None or before.data_ptr() != memory.data_ptr():
        made = parameter_of(of_local(local_of(value).detach(), spec_of(value)), held.requires_grad)
        setattr(made, HELD, getattr(held, HELD, None))
        setattr(held, _ASSIGNED, (memory, made))
    if "." in key:  # of a stack, which torch would refuse to set by its name
        module._parameters[key] = made
        metadata[ASSIGN] = False
    found: nn.Parameter = made
    return found


def forget_translation(module: nn.Module) -> None:
    """Remove the hooks that a copy of a module has of :func:`translate_state`."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if hasattr(getattr(hook, "hook", hook), _MARK):
                del hooks[key]
