"""Initialising functions on the parameters of a parallel module, as on one device from the same seed.

The third door to the private parts of DTensor. In torch 2.13 each rank draws numbers for its own part, a view across
the parts (``weight[0]``) is a copy, so that what is written to it is lost, and some operators write wholes into parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import init
from torch.utils import _pytree as pytree

from autopar.dtensors import copied_views
from autopar.dtensors.dtensor import local_of
from autopar.dtensors.means_of_parts import LOOKED_UP, MEANS, handler
from autopar.dtensors.whole_operators import on_whole, put, refuse
from autopar.errors import InvariantError

aten = torch.ops.aten
Owns = Callable[[Tensor], bool]
DRAWN = {  # numbers are drawn into the tensor
    *(aten.normal_.default, aten.uniform_.default, aten.exponential_.default, aten.log_normal_.default),
    *(aten.cauchy_.default, aten.geometric_.default, aten.bernoulli_.float, aten.bernoulli_.Tensor),
    *(aten.random_.default, aten.random_.to, getattr(aten.random_, "from")),
}
WHOLE = {  # computed on whole tensors
    *(aten.rand_like.default, aten.randn_like.default, aten.randint_like.default, aten.randint_like.low_dtype),
    *(aten.bernoulli.default, aten.bernoulli.p, aten.native_dropout.default),
    *(aten.eye.m_out, aten.eye.out, aten.linalg_qr.default, aten.diagonal.default),
    *(aten.fill_.Tensor, aten.index_put_.default, aten.index_fill_.int_Scalar, aten.index_copy_.default),
    *(aten.index_add_.default, aten.index_add.default, aten.index_reduce_.default, aten.index_reduce.default),
}
VIEWS = {  # of some of a dim, where that is split: the operator -> the place of the dim in its arguments
    aten.select.int: 1,
    aten.slice.Tensor: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.unbind.int: 1,
}
RESHAPED = {aten.view.default, aten._unsafe_view.default}
WHOLE_VIEWS = {  # which the parts give
    *(aten.t.default, aten.transpose.int, aten.permute.default, aten.detach.default, aten.alias.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default),
}
_OF_TORCH: dict[Any, Any] = {}  # handlers that stood where ours do
_OF_PARAMETER = "autopar_view"  # on such a view of a parameter


def watch_initialising(is_ours: Owns, is_parameter: Owns, is_of_stage: Owns) -> None:
    """Let it be so for tensors that are ``is_ours``, views of those that are parameters or their ``.data``.

    On a pipeline (``is_of_stage``) drawing into a parameter raises InvariantError: one device draws for all stages.
    """

    def refuse_on_stages(operator: Any, args: Any) -> None:
        if operator in DRAWN and is_parameter(args[0]) and is_of_stage(args[0]):
            raise InvariantError(
                f"{operator._schema.name.rpartition('::')[2]} draws numbers for a parameter of one pipeline stage; "
                "from the same seed one device draws those of all stages\n"
                "Way out: initialise the model before parallelize, or load it from files."
            )

    def whole(operator: Any, args: Any, kwargs: Any) -> Any:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, DTensor)]
        if not tensors or not is_ours(tensors[0]):
            return _usual(operator, args, kwargs)
        return on_whole(operator, args, kwargs)

    def copied(operator: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        if isinstance(source, DTensor) or not is_ours(target) or source.shape != target.shape:
            return _usual(operator, args, kwargs)
        put(target, source.detach().to(local_of(target)))
        return target

    def transposed(operator: Any, args: Any, kwargs: Any) -> Any:
        if not is_ours(args[0]):
            return _usual(operator, args, kwargs)
        raise InvariantError(
            "a tensor of a parallel module cannot be transposed in place (as an orthogonal_ does that a script has "
            "imported by itself)\nWay out: torch.nn.init.orthogonal_(weight), called by this name, or x = x.t()."
        )

    refuse(refuse_on_stages)
    handlers = _handlers()
    if aten.as_strided.default in handlers:
        _OF_TORCH[aten.as_strided.default] = handlers[aten.as_strided.default]
    handlers.update(dict.fromkeys(DRAWN | WHOLE, whole))
    handlers.update(
        dict.fromkeys([*VIEWS, *RESHAPED, *WHOLE_VIEWS, aten.as_strided.default], _viewing(is_ours, is_parameter))
    )
    handlers.update(dict.fromkeys(MEANS | LOOKED_UP, handler(is_ours, _usual)))
    handlers[aten.copy_.default] = copied
    handlers[aten.t_.default] = handlers[aten.transpose_.default] = transposed
    _draw_orthogonal(is_ours)


def _viewing(is_ours: Owns, is_parameter: Owns) -> Callable[[Any, Any, Any], Any]:
    """What computes views, so that what is written to one reaches the tensor, or is refused."""

    def view(operator: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        has_gradient = tensor.requires_grad and torch.is_grad_enabled() and operator is not aten.detach.default
        if not is_ours(tensor):
            return _usual(operator, args, kwargs)
        if has_gradient:
            found = _usual(operator, args, kwargs)
            is_copy = (
                not _shares(found, tensor) if operator in RESHAPED else operator in VIEWS and _cuts(operator, args)
            )
            return copied_views.copied(found) if is_copy else found
        owned = is_parameter(tensor) or _OF_PARAMETER in vars(tensor)
        if (owned or operator not in RESHAPED) and _cuts(operator, args):
            return on_whole(operator, args, kwargs)
        found = _usual(operator, args, kwargs)
        if operator in RESHAPED and not owned and not _shares(found, tensor):
            return on_whole(operator, args, kwargs)
        for one in pytree.tree_leaves(found) if owned else ():
            setattr(one, _OF_PARAMETER, True)
        return found

    return view


def _draw_orthogonal(is_ours: Owns) -> None:
    """``torch.nn.init.orthogonal_`` transposes in place, which no DTensor does."""
    usual = init.orthogonal_

    @wraps(usual)
    def orthogonal(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(tensor, DTensor) or not is_ours(tensor) or not tensor.numel():
            return usual(tensor, *args, **kwargs)
        with torch.no_grad():
            return tensor.copy_(usual(local_of(tensor).new_empty(tensor.shape), *args, **kwargs))

    init.orthogonal_ = orthogonal


def _handlers() -> dict[Any, Any]:
    dispatcher: Any = DTensor._op_dispatcher
    found: dict[Any, Any] = dispatcher._custom_op_handlers
    return found


def _usual(operator: Any, args: Any, kwargs: Any) -> Any:
    """What torch does by itself."""
    handlers = _handlers()
    handler = handlers.pop(operator, None)
    if operator in _OF_TORCH:
        handlers[operator] = _OF_TORCH[operator]
    try:
        return operator(*args, **kwargs)
    finally:
        if handler is not None:
            handlers[operator] = handler


def _split_dims(tensor: DTensor) -> set[int]:
    return {int(one.dim) for one in tensor.placements if hasattr(one, "dim")}


def _cuts(operator: Any, args: Sequence[Any]) -> bool:
    """Whether the parts of the tensor cannot give the view."""
    tensor = args[0]
    split = _split_dims(tensor)
    if operator in RESHAPED:
        return bool(split) and tuple(args[1]) != tuple(tensor.shape)
    if operator in WHOLE_VIEWS:
        return False
    if operator is aten.as_strided.default:
        return tuple(args[1]) != tuple(tensor.shape) or tuple(args[2]) != tensor.stride()
    place = VIEWS[operator]
    dim = (args[place] if len(args) > place else 0) % max(1, tensor.dim())
    if operator is aten.slice.Tensor and _is_all(args, tensor.shape[dim]):
        return False
    return dim in split


def _shares(view: Any, tensor: Tensor) -> bool:
    """Whether ``view`` is one of this rank's part, and not of what was gathered, and can be cut again.

    The same on all ranks.
    """
    if not all(type(one) in (Shard, Replicate) for one in view.placements):
        return False
    return bool(local_of(view).untyped_storage()._cdata == local_of(tensor).untyped_storage()._cdata)


def _is_all(args: Sequence[Any], size: int) -> bool:
    start, end, step = (*args[2:], *(None, None, None)[len(args) - 2 :])[:3]
    return (start or 0) == 0 and (end is None or end >= size) and (step or 1) == 1
