"""Inputs and outputs whose memory holds what a forward pass saves: a backward pass is refused once they are written to.

Torch counts how often a tensor was written to, and a saved tensor and all that share its memory have one count. Not so
here: a program makes views without autograd, and a DTensor counts apart from its part. So the users' tensors are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from autopar.dtensors.dtensor import local_of
from autopar.errors import InvariantError
from autopar.runtime.written_between import memory_of


class Shared(NamedTuple):
    """A tensor of the user, named ``what``: ``alias`` counts writes with it, and keeps no graph; so does ``local``."""

    what: str
    alias: Tensor
    local: Tensor
    writes: int


class SharedWithUsers:
    """Of one program: ``names`` of its inputs and outputs, of those in ``counted`` torch itself may know all.

    Which are shared :meth:`learn` tells, after forward passes until it :attr:`is_known`; :attr:`positions` has those
    that have to be asked.
    """

    def __init__(self, names: Sequence[str], counted: Sequence[bool]) -> None:
        self._names, self._counted, self.is_known = names, counted, False
        self.positions: list[int] = []

    def learn(self, tensors: Sequence[Tensor], saved: Iterable[Any]) -> None:
        """``tensors``: of each of the names this rank's memory; what a forward pass has ``saved``."""
        kept = [value for value in saved if isinstance(value, Tensor)]
        same, memory = set(map(id, kept)), {memory_of(value) for value in kept if value.numel()}
        self.positions = [
            at
            for at, (each, counted) in enumerate(zip(tensors, self._counted))
            if not (counted and id(each) in same) and memory_of(each) in memory and not each.is_inference()
        ]
        self.is_known = all(each.is_contiguous() for each in tensors)  # other inputs are copied

    def after(self, tensors: Sequence[Tensor]) -> list[Shared]:
        """What :func:`check_shared` takes; ``tensors``: of each of the names that of the user."""
        return [shared(self._names[at], tensors[at]) for at in self.positions]


def shared(what: str, tensor: Tensor) -> Shared:
    """``tensor`` as it is now."""
    alias, local = tensor.detach(), local_of(tensor)
    local = alias if local is tensor else local  # an output leads to the node that keeps this
    return Shared(what, alias, local, alias._version + local._version)


def shared_with(saved: Iterable[Any], tensors: Iterable[tuple[str, Tensor]]) -> list[Shared]:
    """Those of the users' ``tensors``, each with its name, whose memory holds what was ``saved``."""
    memory = {memory_of(value) for value in saved if isinstance(value, Tensor) and value.numel()}
    found = [(what, tensor) for what, tensor in tensors if memory_of(local_of(tensor)) in memory]
    return [shared(what, tensor) for what, tensor in found if not tensor.is_inference()]


def check_shared(before: Sequence[Shared], saved: Callable[[], Iterable[Any]]) -> None:
    """Raise InvariantError where one of those was written to that hold what was ``saved``."""
    written = [each for each in before if each.alias._version + each.local._version != each.writes]
    memory = {memory_of(value) for value in saved() if isinstance(value, Tensor)} if written else set()
    names = list(dict.fromkeys(each.what for each in written if memory_of(each.local) in memory))
    if names:
        raise InvariantError(
            f"{', '.join(names[:3])} {'was' if len(names) == 1 else 'were'} written to between the forward pass and "
            "this backward pass, which computes with what it held (torch: modified by an inplace operation)\n"
            "Way out: write to a copy, tensor.clone(), or after loss.backward()."
        )
