"""Torch's helpers for gradients on a pipeline, where each rank has the parameters of its stages only.

The door to what they use inside. A ``GradScaler`` skips a step on all stages or on none. ``clip_grad_norm_`` and
``get_total_norm`` of ``torch.nn.utils`` take the norm of one stage; they cannot know that a tied parameter is on two
stages, so they are refused, and ``model.clip_grad_norm_`` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

from autopar.dtensors.dtensor import spec_of
from autopar.errors import InvariantError
from autopar.notes import warn

_UNSCALE: Any = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default
_stages: list[tuple[DeviceMesh, Callable[[Tensor], Tensor]]] = []


def is_stage(mesh: DeviceMesh, largest: Callable[[Tensor], Tensor]) -> None:
    """Let gradients on ``mesh`` be those of one stage; ``largest`` gives the largest of a number over all stages."""
    _install()
    if not any(mesh is known for known, _ in _stages):
        _stages.append((mesh, largest))


def _stage_of(tensors: Iterable[Tensor]) -> Callable[[Tensor], Tensor] | None:
    meshes = [spec_of(tensor).mesh for tensor in tensors if isinstance(tensor, DTensor)]
    return next((largest for known, largest in _stages if any(mesh is known for mesh in meshes)), None)


def is_of_stage(tensor: Tensor) -> bool:
    """Whether ``tensor`` is held by the ranks of one pipeline stage."""
    return _stage_of([tensor]) is not None


def _warn() -> None:
    warn(
        "numbers of single parameters or gradients are read on one pipeline stage (norm().item(), or stacked): a sum "
        "of them is that of this stage and not of the model, another one on each stage\n"
        "Way out: model.clip_grad_norm_(max_norm) gives the norm of all gradients, with max_norm=float('inf') it "
        "changes none; torch.distributed.all_reduce adds numbers of stages up."
    )


def hear_of_numbers(tensors: Sequence[Tensor]) -> None:
    """Some numbers, each of a tensor, are read (one) or put together (several)."""
    if _stages and all(tensor.dim() == 0 for tensor in tensors) and _stage_of(tensors) is not None:
        _warn()


@cache
def _install() -> None:
    handlers: Any = DTensor._op_dispatcher._custom_op_handlers
    unscale: Any = handlers[_UNSCALE]
    total_norm: Any = clip_grad._get_total_norm  # type: ignore[attr-defined]

    def unscale_on_stages(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        unscale(operator, args, kwargs)
        largest = _stage_of(args[0])
        if largest is not None:
            args[1].copy_(largest(args[1]))

    def norm_of_a_stage(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if _stage_of(found) is not None:
            raise InvariantError(
                "torch.nn.utils.clip_grad_norm_ has the gradients of one pipeline stage, and would clip by their norm "
                "(so with get_total_norm)\n"
                "Way out: model.clip_grad_norm_(max_norm), which clips by the norm of all stages."
            )
        return total_norm(found, *args, **kwargs)

    def stacked(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args[0]) > 1:
            hear_of_numbers(args[0])
        del handlers[operator]
        try:
            return operator(*args, **kwargs)
        finally:
            handlers[operator] = stacked

    handlers[_UNSCALE] = unscale_on_stages
    handlers[torch.ops.aten.stack.default] = stacked
    clip_grad._get_total_norm = norm_of_a_stage  # type: ignore[attr-defined]
    torch.nn.utils.get_total_norm = norm_of_a_stage  # type: ignore[assignment]
