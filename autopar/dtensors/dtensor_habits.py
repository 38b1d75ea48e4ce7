"""What scripts do with parameters, gradients and outputs, done by DTensors of a parallel module as by whole tensors.

The other door to the private parts of DTensor (beside ``dtensor.py``). In torch 2.13, ``p.data = x`` is lost without a
word on a DTensor, ``p.data.add_(x)`` leaves no trace in its version, ``p.grad.norm().item()`` gives the number of this
rank's part, ``logits.numpy()`` does not exist, and ``p.share_memory_()`` ends the process. Tensors on DeviceMeshes that
no parallel module has are left alone.

A script that has called ``p.to_local()`` may write to the part where nobody sees it (``part.data.add_(x)``), so this is
remembered, and the part gets memory of its own.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.dtensors.dtensor import HELD, keep_within, local_of, spec_of
from autopar.dtensors.dtensor_rules import correct_rules
from autopar.dtensors.initialising import watch_initialising
from autopar.dtensors.local_steps import let_optimizers_use_parts
from autopar.dtensors.piecewise import PiecewiseDTensor, let_torch_use_pieces
from autopar.dtensors.torch_on_stages import hear_of_numbers, is_of_stage
from autopar.dtensors.whole_operators import whole
from autopar.errors import InvariantError

_SCALAR: Any = torch.ops.aten._local_scalar_dense.default
_meshes: list[DeviceMesh] = []
_SHOWN, _DATA_OF = "autopar_shown", "autopar_data_of"  # on a parameter: its states before and after; on its ``.data``
_GATHERED = "autopar_gathered"  # on a parameter of which a whole one stays: its part then, if it is shown
State = tuple[int, int]


def take_over(mesh: DeviceMesh) -> None:
    """Let tensors on ``mesh`` behave so from now on."""
    _install()
    if not any(mesh is known for known in _meshes):
        _meshes.append(mesh)


@cache
def _install() -> None:
    let_torch_use_pieces()
    let_optimizers_use_parts()
    correct_rules(_is_our_mesh)
    watch_initialising(_is_ours, _is_parameter, is_of_stage)
    dispatcher: Any = DTensor._op_dispatcher
    dispatcher._custom_op_handlers[_SCALAR] = _scalar
    usual: Any = torch._C.TensorBase.data  # type: ignore[attr-defined]

    def get(self: DTensor) -> Tensor:
        if not _is_ours(self):
            found: Tensor = usual.__get__(self)
            return found
        data: Tensor = self.detach()  # which shares the counter of changes
        if HELD in vars(self):
            setattr(data, _DATA_OF, self)
        return data

    def put(self: DTensor, value: Tensor) -> None:
        if _is_ours(self):
            _put(self, value)
        else:
            usual.__set__(self, value)

    owner, piecewise = cast(Any, DTensor), cast(Any, PiecewiseDTensor)
    owner.data = property(get, put)
    for kind in (piecewise, owner):
        kind.to_local = _noting(kind.to_local)
    owner.numpy = _of_whole("numpy")
    owner.tolist = _of_whole("tolist")
    owner.share_memory_ = _shared


def shown_parts() -> int:
    """1 where this process has called ``to_local()`` of a parameter of any parallel module; 2 if :func:`is_behind`."""
    if not _shown.any:
        return 0
    found = {key: parameter for key, one in _shown.gathered.items() if (parameter := one()) is not None}
    _shown.gathered = {key: _shown.gathered[key] for key in found}
    return 1 + any(map(is_behind, found.values()))


def is_shown(parameter: Tensor) -> bool:
    """Whether somebody may hold this rank's part of ``parameter``."""
    return _SHOWN in vars(parameter)


def state_of_part(parameter: Tensor) -> State:
    """Another one where this rank's part was written to, or replaced; to show it does not count."""
    before, after = vars(parameter).get(_SHOWN, (None, None))
    now = _state_of(local_of(parameter))
    return before if now == after else now


def note_gathered(parameter: Tensor) -> None:
    """Remember that a whole parameter was made of the parts as they are, for :func:`is_behind`."""
    if is_shown(parameter):
        _shown.gathered[id(parameter)] = ref(parameter)
    vars(parameter)[_GATHERED] = local_of(parameter).clone() if is_shown(parameter) else None


def is_behind(parameter: Tensor) -> bool:
    """Whether somebody has written to this rank's part since :func:`note_gathered`, though no version tells."""
    then, now = vars(parameter).get(_GATHERED), local_of(parameter)
    return then is not None and not (then.shape == now.shape and bool(((then == now) | (then != then)).all()))


def _state_of(part: Tensor) -> State:
    return part._version, part.data_ptr()


def _show(parameter: DTensor) -> None:
    before = _state_of(part := local_of(parameter))
    if _GATHERED in vars(parameter):  # the part may be memory of the whole parameter, with which backward computes
        keep_within(parameter, part.clone())
    setattr(parameter, _SHOWN, (before, _state_of(local_of(parameter))))
    if _GATHERED in vars(parameter):
        note_gathered(parameter)
    _shown.any = True


class _Shown:
    def __init__(self) -> None:
        self.any = False
        self.gathered: dict[int, ReferenceType[Tensor]] = {}  # of shown parameters of which whole ones stay


_shown = _Shown()


def _noting(usual: Any) -> Any:
    """``to_local`` that remembers of which parameters it was called."""

    @wraps(usual)
    def to_local(self: DTensor, *args: Any, **kwargs: Any) -> Any:
        parameter = vars(self).get(_DATA_OF, self)
        if HELD in vars(parameter) and _SHOWN not in vars(parameter):
            _show(parameter)
        return usual(self, *args, **kwargs)

    return to_local


def _is_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter of a parallel module, or its ``.data``."""
    return HELD in vars(tensor) or _DATA_OF in vars(tensor)


def _is_ours(tensor: Tensor) -> bool:
    if not isinstance(tensor, DTensor):
        return False
    return _is_our_mesh(spec_of(tensor).mesh)


def _is_our_mesh(mesh: DeviceMesh) -> bool:
    return any(mesh is known or mesh == known for known in _meshes)


def _put(held: DTensor, value: Tensor) -> None:
    """``held.data = value``: the part of a whole tensor, or a DTensor that is held alike, becomes that of ``held``."""
    spec = spec_of(held)
    if value.shape != held.shape or value.dtype != held.dtype:
        raise InvariantError(
            f"parameter.data = a tensor {list(value.shape)} of {value.dtype}, for one {list(held.shape)} of "
            f"{held.dtype}\nWay out: model.to(dtype) for another dtype; a new nn.Parameter for another shape."
        )
    if isinstance(value, DTensor) and spec_of(value).placements == spec.placements and value.device_mesh == spec.mesh:
        local = local_of(value)
    else:
        holder = getattr(held, HELD, None)
        if holder is None:
            raise InvariantError("tensor.data = ... of a part needs a DTensor with the same placements")
        local = local_of(holder.cut(whole(value)))
    held._local_tensor = local.detach()


def _scalar(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``tensor.item()``, ``float(tensor)``, ``if tensor:``: of the whole; collective where each rank has a part."""
    tensor = args[0]
    hear_of_numbers([tensor])
    found = whole(tensor) if _is_ours(tensor) else local_of(tensor)
    return operator(found, **kwargs)


def _shared(self: DTensor) -> DTensor:
    """``share_memory_()``, of this rank's part: torch takes the memory of the whole, of which there is none."""
    local_of(self).share_memory_()  # type: ignore[no-untyped-call]
    return self


def _of_whole(name: str) -> Any:
    usual: Any = getattr(Tensor, name)

    def of_whole(self: DTensor, *args: Any, **kwargs: Any) -> Any:
        return usual(whole(self) if _is_ours(self) else self, *args, **kwargs)

    return of_whole
