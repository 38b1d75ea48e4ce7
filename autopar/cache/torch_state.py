"""Torch's own modes and choices under which a model is traced; this file alone asks its private parts for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from autopar.cache.code_digests import digest
from autopar.cache.reasons import Unstorable
from autopar.cache.value_digests import Digests
from autopar.observation.source_lines import is_users_file

_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    "_global_parameter_registration_hooks", "_global_module_registration_hooks", "_global_buffer_registration_hooks",
)  # fmt: skip
_CONFIGS = ("torch._dynamo.config", "torch._functorch.config", "torch.fx.experimental._config", "torch._export.config")


def modes_of_torch() -> dict[str, str]:
    """Name -> what torch is set to. Raises Unstorable within modes, and with hooks, that see each operator."""
    _refuse_what_sees_operators()
    backends: Any = torch.backends
    found = {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "gradients": f"{torch.is_grad_enabled()} {torch.is_inference_mode_enabled()}",
        "deterministic": f"{torch.are_deterministic_algorithms_enabled()} "
        f"{torch.is_deterministic_algorithms_warn_only_enabled()}",
        "fast paths": f"{backends.mha.get_fastpath_enabled()} {backends.mkldnn.enabled} {backends.cudnn.enabled}",
        "attention": f"{backends.cuda.flash_sdp_enabled()} {backends.cuda.mem_efficient_sdp_enabled()} "
        f"{backends.cuda.math_sdp_enabled()} {backends.cuda.cudnn_sdp_enabled()}",
        "products": " ".join(  # what is not set is exact
            one.fp32_precision.replace("none", "ieee")
            for one in (backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn)
        ),
        "of torch.__future__": str(torch.__future__.get_overwrite_module_params_on_conversion()),
    }
    for kind in ("cpu", "cuda"):
        enabled = torch.is_autocast_enabled(kind)
        found[f"autocast on {kind}"] = f"{torch.get_autocast_dtype(kind)}" if enabled else "off"
    found["cache of autocast"] = str(torch.is_autocast_cache_enabled())
    found["what was put into torch"] = digest(*_put_into_torch())
    for name in _CONFIGS:
        found[name] = _unusual(sys.modules.get(name))
    return found


def _put_into_torch() -> Iterator[str]:
    """Functions of others under names of torch's."""
    digests = Digests(lambda _: None)
    spaces = (torch, functional, torch.special, torch.linalg, torch.fft)
    places: tuple[Any, ...] = (*spaces, torch.autograd.Function, *Tensor.__mro__)
    for place in places:
        for key, value in list(vars(place).items()):
            if isinstance(value, FunctionType) and is_users_file(value.__code__.co_filename):
                yield f"{place.__name__}.{key} {digests.leniently(value)}"


def _unusual(config: Any) -> str:
    """What is not as usual in a module of torch's settings; one that was never loaded is as usual."""
    if config is None:
        return "{}"
    entries = vars(config)["_config"]
    now = config.get_config_copy()
    return str({key: value for key, value in sorted(now.items()) if value != entries[key].default})


def _refuse_what_sees_operators() -> None:
    if any(getattr(modules, name, None) for name in _HOOKS):
        raise Unstorable("there are hooks for all modules (torch.nn.modules.module.register_module_forward_hook, ...)")
    functions: Any = _get_current_function_mode_stack
    modes: list[Any] = [*functions(), *_get_current_dispatch_mode_stack()]
    if modes:
        raise Unstorable(f"a mode of torch is on ({type(modes[-1]).__name__}), which may do anything to operators")
