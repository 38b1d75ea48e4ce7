"""Operators on DTensors, computed by every rank on whole tensors: always right, at the price of gathering them.

What an operator writes to a whole tensor, each rank takes its part of. A view of a DTensor that its parts cannot give
is a :class:`Window`: what is written to it reaches the DTensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.utils import _pytree as pytree

from autopar.dtensors.dtensor import full_of, local_of, of_local, spec_of
from autopar.dtensors.slices import slices_of
from autopar.errors import InvariantError


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, without a gradient; collective where it is in parts."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    local = local_of(tensor).detach()
    if all(placement.is_replicate() for placement in tensor.placements):
        return local
    return local.new_empty(tensor.shape) if local.is_meta else full_of(tensor.detach())


def put(tensor: DTensor, found: Tensor) -> None:
    """Let this rank's part of ``tensor`` be that of the whole ``found``."""
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise InvariantError(f"a tensor that is a sum over ranks ({tensor.placements}) cannot be written to")
    local = local_of(tensor)
    if not local.is_meta and found.untyped_storage().data_ptr() != local.untyped_storage().data_ptr():
        slices_of(tensor).copy_from(found)


def finish(tensor: DTensor) -> None:
    """Have all of ``tensor``, a sum over ranks, on every rank; collective. It stays the same object."""
    found = _everywhere(whole(tensor), tensor)
    tensor._local_tensor, tensor._spec = local_of(found), spec_of(found)


_checks: list[Callable[[Any, Any], None]] = []


@dataclass
class _Frame:
    """The whole of ``base``, of which windows are views; ``seen``: the numbers of ``base`` that it has."""

    base: DTensor
    whole: Tensor
    seen: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = self._now()

    def _now(self) -> tuple[int, ...]:
        local = local_of(self.base)
        return id(local), local._version, self.base._version

    def refresh(self, always: bool) -> None:
        """Have what ``base`` has by now; collective if it has changed, or ``always``."""
        if always or self.seen != self._now():
            self.whole.copy_(whole(self.base))
            self.seen = self._now()

    def put(self) -> None:
        put(self.base, self.whole)
        self.seen = self._now()


class Window(DTensor):
    """A view, whole on every rank, of a DTensor whose parts cannot give it; writing to it writes to the DTensor."""

    _frame: _Frame

    @classmethod
    def of(cls, view: Tensor, frame: _Frame) -> Window:
        made: Window = torch.Tensor._dtensor__new__(  # type: ignore[attr-defined]
            cls, view, spec_of(_everywhere(view, frame.base)), requires_grad=False
        )
        made._frame = frame
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return on_whole(func, args, kwargs or {})


def refuse(check: Callable[[Any, Any], None]) -> None:
    """Call ``check(operator, arguments)`` before an operator is computed on whole tensors."""
    _checks.append(check)


def on_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of ``func``, whole on every rank; collective."""
    for check in _checks:
        check(func, args)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    parts = {id(leaf): leaf for leaf in leaves if isinstance(leaf, DTensor)}
    written = _written(func, args, kwargs)
    wholes = {key: _enter(leaf, key in written) for key, leaf in parts.items()}
    inner_args, inner_kwargs = pytree.tree_unflatten([wholes.get(id(leaf), leaf) for leaf in leaves], tree)
    result = func(*inner_args, **inner_kwargs)
    for key in written:
        if key in parts:
            _leave(parts[key], wholes[key])
    back = {id(wholes[key]): part for key, part in parts.items()}
    like = next(iter(parts.values()))
    frame = _frame_of(args[0], wholes[id(args[0])]) if is_view(func) and id(args[0]) in parts else None

    def given(tensor: Tensor) -> Tensor:
        if id(tensor) in back:
            return back[id(tensor)]
        return _everywhere(tensor, like) if frame is None else Window.of(tensor, frame)

    return pytree.tree_map_only(Tensor, given, result)


def _enter(tensor: DTensor, is_written: bool) -> Tensor:
    if isinstance(tensor, Window):
        tensor._frame.refresh(always=is_written)
        return local_of(tensor)
    return whole(tensor)


def _leave(tensor: DTensor, found: Tensor) -> None:
    if isinstance(tensor, Window):
        tensor._frame.put()
    else:
        put(tensor, found)


def _frame_of(tensor: DTensor, found: Tensor) -> _Frame:
    return tensor._frame if isinstance(tensor, Window) else _Frame(tensor, found)


def _everywhere(tensor: Tensor, like: DTensor) -> DTensor:
    """``tensor`` as a DTensor that is whole on every rank of the mesh of ``like``."""
    mesh = like.device_mesh
    with torch.no_grad():
        made = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return of_local(tensor, spec_of(made))


def is_view(func: Any) -> bool:
    """Whether the operator ``func`` gives views of what it is given."""
    found = [one.alias_info for one in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in found)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The identities of the tensors that ``func`` writes to."""
    return [id(leaf) for leaf in _leaves_written(func, args, kwargs)]


def tensors_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[DTensor]:
    """The DTensors that ``func`` writes to."""
    return [leaf for leaf in _leaves_written(func, args, kwargs) if isinstance(leaf, DTensor)]


def _leaves_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    names = [one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write]
    return [leaf for name in names for leaf in pytree.tree_leaves(given.get(name))]
