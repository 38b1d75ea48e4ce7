"""A model and its arguments in the dtype in which it computes, while it is traced (``Precision.param``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def recast(model: nn.Module, dtype: torch.dtype | None) -> Iterator[dict[str, torch.dtype]]:
    """Within this context, ``model`` has stand-ins of ``dtype`` for its floating parameters (None: no stand-ins).

    Gives name -> own dtype of the parameters that have one, under each of their names. Tied ones stay tied. Batch norm
    keeps its parameters beside its running statistics, which are buffers: torch takes no mixture of these.
    """
    made: dict[int, nn.Parameter] = {}
    before: dict[str, torch.dtype] = {}
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "running_mean", None) is not None:
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or not _differs(parameter, dtype):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            before[f"{path}.{key}" if path else key] = parameter.dtype
            swapped.append((module, key, parameter))
    try:
        for module, key, parameter in swapped:
            _put(module, key, made[id(parameter)])
        yield before
    finally:
        for module, key, parameter in swapped:
            _put(module, key, parameter)


def recast_call(args: Any, dtype: torch.dtype | None) -> Any:
    """``args`` with copies in ``dtype`` of its floating tensors; they require gradients where those do."""

    def copy(tensor: Tensor) -> Tensor:
        cast = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
        return cast if _differs(tensor, dtype) else tensor

    return pytree.tree_map_only(Tensor, copy, args) if dtype is not None else args


def _differs(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    return dtype is not None and tensor.dtype.is_floating_point and tensor.dtype != dtype


def _put(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    module._parameters[key] = parameter
    if isinstance(module, nn.RNNBase):  # it computes with a list of its own
        names = module._flat_weights_names
        module._flat_weights = [getattr(module, name, None) for name in names]
