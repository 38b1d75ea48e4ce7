"""Torch's switches, of which a program knows nothing: a model that asks for one has another program when one differs.

The default dtype, determinism and the dtypes of autocast belong to every call (``autopar/calls/torch_settings.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

SWITCHES = "switches of torch"
_NAMES = (
    "is_deterministic_algorithms_warn_only_enabled", "get_deterministic_debug_mode", "get_float32_matmul_precision",
    "get_num_threads", "get_num_interop_threads", "is_autocast_cache_enabled", "get_autocast_dtype",
    "get_autocast_cpu_dtype", "get_autocast_gpu_dtype", "is_warn_always_enabled", "is_anomaly_enabled",
    "is_anomaly_check_nan_enabled", "get_default_device",
)  # fmt: skip
_OF_KINDS = ("get_autocast_dtype",)  # which take the kind of a device
_OF_ATTENTION = (
    "flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled",
    "fp16_bf16_reduction_math_sdp_allowed",
)  # fmt: skip
_OF_PRODUCTS = (
    "allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation", "fp32_precision",
)  # fmt: skip
_backends: Any = torch.backends
_PROPERTY: Any = _backends.ContextProp
_MODULES = (_backends, *[getattr(_backends, name) for name in ("cudnn", "mkldnn", "nnpack", "opt_einsum", "mkl")])
_PRECISION: Any = type(_backends.cudnn.conv)  # of one kind of operators, on one kind of device


def _functions() -> Iterator[Callable[..., Any]]:
    yield from (getattr(torch, name) for name in _NAMES)
    yield from (getattr(_backends.cuda, name) for name in _OF_ATTENTION if hasattr(_backends.cuda, name))


_FUNCTIONS = tuple(_functions())
_PROPERTIES = tuple(
    (module, name) for module in _MODULES for name, one in vars(type(module)).items() if isinstance(one, _PROPERTY)
)
_PROPERTIES += tuple((_backends.cuda.matmul, name) for name in _OF_PRODUCTS)
_PROPERTIES += tuple(
    (getattr(module, kind), "fp32_precision")
    for module in (_backends.cudnn, _backends.mkldnn)
    for kind in ("conv", "rnn", "matmul")
    if hasattr(module, kind)
)


def switches() -> tuple[str, ...]:
    """How all are set."""
    found = list[str]()
    for function in _FUNCTIONS:
        kinds = ("cpu", "cuda") if function.__name__ in _OF_KINDS else ()
        found += [_answer(function, kind) for kind in kinds] or [_answer(function)]
    return (*found, *[_answer(getattr, module, name) for module, name in _PROPERTIES])


def _answer(function: Callable[..., Any], *args: Any) -> str:
    """torch does not tell of ``allow_tf32`` where ``fp32_precision`` was set; nor has each release each switch."""
    try:
        return str(function(*args))
    except (RuntimeError, AttributeError) as problem:
        return type(problem).__name__


def called_in_profiles() -> dict[Any, str]:
    """How ``cProfile`` knows what tells of a switch -> :data:`SWITCHES`."""
    functions = (*_FUNCTIONS, _PROPERTY.__get__, type(_backends.cuda.matmul).__getattr__, _PRECISION.__getattr__)
    return {name_in_profiles(function): SWITCHES for function in functions}


def name_in_profiles(function: Any) -> Any:
    """How ``cProfile`` knows ``function``: by its code, or what is in C by its name."""
    code = getattr(function, "__code__", None)
    return code if code is not None else f"<built-in method {function.__module__}.{function.__name__}>"
