"""Gradients to which something is still to be added: it is, as soon as somebody computes with one.

The fifth door to the private parts of DTensor. What stands in ``.grad`` meanwhile has shape, dtype and identity as any
gradient; its part, by which everything is computed, is asked for under one name, ``_local_tensor``. Who asks has what
waits added first, on all ranks. ``.grad = None`` drops it, as on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.dtensors.dtensor import kind_of_spec, local_of, new_dtensor, spec_of
from autopar.dtensors.piecewise import PiecewiseDTensor
from autopar.errors import InvariantError

_part: Any = DTensor.__dict__["_local_tensor"]
_ADD = torch.ops.aten.add_.Tensor
_COMPLETE, _BLANK = "autopar_complete", "autopar_blank"  # on a gradient that waits: who adds what waits; no part yet


def _computed_with(self: Any) -> Tensor:
    vars(self)[_COMPLETE]()
    if type(self) in _ORDINARY:
        raise InvariantError(
            "this gradient was taken out of .grad while passes in no_sync() waited to be added to it, and they were "
            "dropped\nWay out: read it, or clone() it, before .grad is set to something else."
        )
    found: Tensor = _part.__get__(self)
    return found


def _dispatched(usual: Any) -> Any:
    def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ADD and not kwargs and _adds(*args):
            return args[0]
        for one in pytree.tree_leaves((args, kwargs)):
            if type(one) in _ORDINARY:
                local_of(one)
        return func(*args, **(kwargs or {}))

    return classmethod(dispatch)


class Waiting(DTensor):
    """Such a gradient."""

    __slots__ = ()
    _local_tensor = property(_computed_with, _part.__set__)
    __torch_dispatch__ = _dispatched(DTensor)


class WaitingPieces(PiecewiseDTensor):
    """Such a gradient whose parts are no neighbours."""

    __slots__ = ()
    _local_tensor = property(_computed_with, _part.__set__)
    __torch_dispatch__ = _dispatched(PiecewiseDTensor)


_WAITING: dict[Any, Any] = {DTensor: Waiting, PiecewiseDTensor: WaitingPieces}
_ORDINARY: dict[Any, Any] = {waiting: usual for usual, waiting in _WAITING.items()}
Stand = ReferenceType[Any]


def can_wait(parameter: Tensor) -> bool:
    """Whether something can wait to be added to the gradient of ``parameter``."""
    grad: Any = parameter.grad
    if not isinstance(parameter, DTensor) or not parameter.requires_grad:
        return False
    if grad is None:
        return kind_of_spec(spec_of(parameter)) in _WAITING
    return type(grad) in _ORDINARY or (type(grad) in _WAITING and spec_of(grad) == spec_of(parameter))


def stand_in(parameter: Tensor, complete: Callable[[], None], gone: Callable[[Stand], None]) -> Stand:
    """The gradient of ``parameter``, to which something is to be added by :func:`fill`.

    ``complete()`` has it added; ``gone`` is called where nobody has the gradient any more.
    """
    grad: Any = parameter.grad
    if grad is None:
        spec = spec_of(parameter)  # type: ignore[arg-type]
        none_yet = local_of(parameter).detach().new_empty(0)
        grad = new_dtensor(_WAITING[kind_of_spec(spec)], none_yet, spec, requires_grad=False)
        vars(grad).update({_COMPLETE: complete, _BLANK: True})
        parameter.grad = grad
    elif type(grad) in _WAITING:
        grad.__class__ = _WAITING[type(grad)]
        vars(grad).update({_COMPLETE: complete, _BLANK: False})
    return ref(grad, gone)


def stands(parameter: Tensor, stand: Stand) -> bool:
    """Whether the gradient that ``stand`` refers to is still that of ``parameter``."""
    grad = parameter.grad
    return grad is not None and grad is stand()


def fill(stand: Stand, part: Tensor) -> None:
    """Add ``part``, which nobody else has, to the gradient that ``stand`` refers to, unless that is gone."""
    grad = stand()
    if grad is not None:
        _add(grad, part)
        grad.__class__ = _ORDINARY.get(type(grad), type(grad))
        for mark in (_COMPLETE, _BLANK):
            if mark in vars(grad):
                delattr(grad, mark)


def _add(grad: Any, part: Tensor) -> None:
    if type(grad) in _ORDINARY and vars(grad)[_BLANK]:
        _part.__set__(grad, part)
        vars(grad)[_BLANK] = False
    else:
        with torch.no_grad():
            _part.__get__(grad).add_(part)


def _adds(grad: Any, other: Any) -> bool:
    """Add an ordinary tensor to a gradient that goes on waiting, as autograd does; whether that was possible."""
    fits = type(grad) in _ORDINARY and type(other) in _WAITING and spec_of(other) == spec_of(grad)
    if fits:
        _add(grad, local_of(other).detach().clone())
    return fits
