"""A DTensor whose parts are no neighbours: ``full_tensor()``, ``redistribute`` and torch's checkpoints have the truth.

Gradients and optimizer states of such a parameter are of the same kind, because operators that treat each number alone
keep the order (:mod:`autopar.dtensors.order_keeping`). Any other operator computes with whole tensors.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any, cast

import torch
import torch.distributed.tensor as tensor_package
from torch import Tensor
from torch.distributed import _state_dict_utils
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement

from autopar.dtensors.dtensor import local_of, of_local, spec_of
from autopar.dtensors.order_keeping import in_stored_order, keeps_order
from autopar.dtensors.placements import Pieces, orders, plain
from autopar.dtensors.slices import Slices, slices_of
from autopar.dtensors.whole_operators import on_whole
from autopar.errors import AutoparError


class PiecesSpec(DTensorSpec):
    """The spec of a tensor with ``Pieces``; ``plain``: that of the tensor in the stored order."""

    @property
    def kind(self) -> type[DTensor]:
        return PiecewiseDTensor

    @cached_property
    def plain(self) -> DTensorSpec:
        return DTensorSpec(self.mesh, plain(self.placements), tensor_meta=self.tensor_meta)

    def like(self, other: DTensorSpec) -> PiecesSpec:
        """This spec with the shape, strides and dtype of ``other``."""
        return PiecesSpec(self.mesh, self.placements, tensor_meta=other.tensor_meta)


class PiecewiseDTensor(DTensor):
    """See the head of this file."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if keeps_order(func, args, kwargs):
            return in_stored_order(func, args, kwargs)
        return on_whole(func, args, kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PiecewiseDTensor(local_tensor={local_of(self)}, mesh={self.device_mesh}, placements={self.placements})"

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole, in its own order; collective. Its gradient is that of the whole, the same on all ranks."""
        found: Tensor = _Gather.apply(self)  # type: ignore[no-untyped-call]
        return found

    def redistribute(
        self, device_mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None, **options: Any
    ) -> DTensor:
        """Collective, by way of the whole."""
        wanted = [Replicate()] * self.device_mesh.ndim if placements is None else list(placements)
        if tuple(wanted) == self.placements:
            return self
        if any(isinstance(one, Pieces) for one in wanted):
            return cut_whole(self.full_tensor(), self.device_mesh, wanted)
        everywhere = [Replicate()] * self.device_mesh.ndim
        whole = DTensor.from_local(self.full_tensor(), self.device_mesh, everywhere, run_check=False)
        return whole.redistribute(device_mesh, wanted, **options)

    def to_local(self, *, grad_placements: Any = None) -> Tensor:
        if not torch.is_grad_enabled():
            return super().to_local()
        found: Tensor = _Local.apply(self)  # type: ignore[no-untyped-call]
        return found

    @staticmethod
    def __tensor_unflatten__(inner: Any, flat: Any, size: Any, stride: Any) -> DTensor:
        placements, meta, _, requires_grad = flat
        meta = TensorMeta(shape=size, stride=stride, dtype=meta.dtype)
        spec = PiecesSpec(inner["device_mesh"], placements, tensor_meta=meta)
        made = of_local(inner["_local_tensor"], spec)
        made.requires_grad_(requires_grad)
        return made

    def __create_write_items__(self, name: str, _: object) -> Any:
        return self._slices().__create_write_items__(name, self)

    def __create_chunk_list__(self) -> Any:
        return self._slices().__create_chunk_list__()

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self._slices().__get_tensor_shard__(index)

    def _slices(self) -> Slices:
        return slices_of(self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: PiecewiseDTensor) -> Tensor:
        ctx.spec = spec_of(tensor)
        whole = of_local(local_of(tensor), ctx.spec.plain).full_tensor()
        for dim, order in orders(tensor.placements).items():
            whole = whole.index_select(dim, order.argsort().to(whole.device))
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:  # type: ignore[override]
        return _part(grad, ctx.spec.mesh, ctx.spec.placements)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
        return _part(whole, mesh, placements)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.full_tensor(), None, None


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: PiecewiseDTensor) -> Tensor:
        ctx.spec = spec_of(tensor)
        local = local_of(tensor)
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> DTensor:  # type: ignore[override]
        return of_local(grad, ctx.spec)


class _OfLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, spec: PiecesSpec) -> DTensor:
        ctx.placements = spec.placements
        return of_local(local.view_as(local), spec)

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return local_of(grad.redistribute(placements=ctx.placements)), None


def _part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's part of ``whole``, which is on all ranks; a meta tensor stays meta."""
    outline = dtensor(_empty_part(whole, mesh, placements), mesh, placements, whole.shape)
    if not whole.is_meta:
        slices_of(outline).copy_from(whole.detach())
    return outline


def _empty_part(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    everywhere = [Replicate()] * mesh.ndim
    outline = dtensor(torch.empty(whole.shape, device="meta"), mesh, everywhere, whole.shape)
    local = local_of(outline.redistribute(placements=plain(placements)))
    return torch.empty(local.shape, dtype=whole.dtype, device=whole.device)


def cut_whole(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """The DTensor with ``placements`` of which all ranks have the ``whole``; differentiable."""
    found: DTensor = _Cut.apply(whole, mesh, tuple(placements))  # type: ignore[no-untyped-call]
    return found


def part_of(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's part of ``whole``, held as ``like``."""
    return _part(whole, like.device_mesh, like.placements)


def dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """The DTensor of global ``shape`` of which ``local`` is this rank's part; no communication, no copy.

    As ``DTensor.from_local`` makes it, in a tenth of the time.
    """
    local = local.detach() if local.is_meta else local.detach().to(mesh.device_type)
    steps = itertools.accumulate((max(size, 1) for size in reversed(shape[1:])), operator.mul, initial=1)
    meta = TensorMeta(torch.Size(shape), tuple(steps)[::-1] if shape else (), local.dtype)
    if not orders(placements):
        return of_local(local, DTensorSpec(mesh, tuple(placements), tensor_meta=meta))
    made = of_local(local, PiecesSpec(mesh, tuple(placements), tensor_meta=meta))
    _check_torch(made)
    return made


_checked: set[bool] = set()


def _check_torch(made: DTensor) -> None:
    """Raise AutoparError where torch (2.11) runs operators of ``made`` as those of any DTensor, past this file."""
    if not _checked:
        _checked.add(isinstance(made.detach(), PiecewiseDTensor))
    if False in _checked:
        raise AutoparError(
            f"a parameter of several parts (a fused query, key, value or gate) is split over {made.device_mesh}, and "
            f"torch {torch.__version__} has no DTensors of such parts\n"
            "Way out: torch 2.13."
        )


_from_local: Callable[..., DTensor] = DTensor.from_local


@cache
def let_torch_use_pieces() -> None:
    """Let what makes a DTensor by placements make a piecewise one by ``Pieces``, such as ``parameter.placements``.

    Arguments keep the names that torch gives them: others call these functions too.
    """
    owner, package, helpers = (cast(Any, place) for place in (DTensor, tensor_package, _state_dict_utils))
    redistribute, distribute, spread = owner.redistribute, package.distribute_tensor, helpers._distribute_tensors

    def redistributed(self: DTensor, device_mesh: Any = None, placements: Any = None, **options: Any) -> DTensor:
        if placements is None or not orders(placements):
            found: DTensor = redistribute(self, device_mesh, placements, **options)
            return found
        return cut_whole(self.full_tensor(), self.device_mesh, placements)

    def from_local(local_tensor: Tensor, device_mesh: Any = None, placements: Any = None, **options: Any) -> DTensor:
        if placements is None or not orders(placements):
            return _from_local(local_tensor, device_mesh, placements, **options)
        shape = options.get("shape") or _shape_of(local_tensor, device_mesh, placements)
        part = dtensor(local_tensor.detach(), device_mesh, placements, shape)
        made: DTensor = _OfLocal.apply(local_tensor, spec_of(part))  # type: ignore[no-untyped-call]
        return made

    def distributed(tensor: Tensor, device_mesh: Any = None, placements: Any = None, **options: Any) -> DTensor:
        if placements is None or not orders(placements):
            plain_one: DTensor = distribute(tensor, device_mesh, placements, **options)
            return plain_one
        return cut_whole(tensor, device_mesh, placements)

    def distributed_state(state: dict[str, Any], keys: list[str], *rest: Any) -> None:
        for key in keys:
            pair = state.get(key)
            if isinstance(pair, tuple) and isinstance(pair[0], PiecewiseDTensor):
                state[key] = part_of(pair[1], pair[0])
        spread(state, keys, *rest)

    owner.redistribute, owner.from_local = redistributed, staticmethod(from_local)
    helpers.distribute_tensor = package.distribute_tensor = distributed
    helpers._distribute_tensors = distributed_state


def _shape_of(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> torch.Size:
    """The shape of the whole of even parts."""
    return _from_local(local.detach(), mesh, list(plain(placements)), run_check=False).shape
