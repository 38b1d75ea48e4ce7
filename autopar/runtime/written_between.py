"""Parameters that are written into after a forward pass, and before its backward pass, which computes with them.

Torch counts how often a tensor was written into, and refuses such a backward pass. What is kept here are parts: a part
counts nothing where its DTensor is written to, and may be memory of a whole parameter. So the DTensors are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from autopar.dtensors.dtensor import local_of
from autopar.errors import InvariantError

Place = tuple[Any, str]  # (table, key) of a parameter


class WrittenBetween:
    """Of one program, with its parameters by name: which of them its first forward pass has kept is known after it.

    ``wholes``: gives whole, resident parameters by name, in whose memory parts may come to lie. ``behind``: gives the
    names of those of which parts were written to past their DTensors.
    """

    def __init__(
        self,
        parameters: Mapping[str, Place],
        wholes: Callable[[], Iterable[tuple[str, Tensor]]] = tuple,
        behind: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._parameters, self._wholes, self._behind = parameters, wholes, behind
        self._kept: list[tuple[str, Any, str]] | None = None

    def after(self, saved: Iterable[Any]) -> list[int]:
        """What :meth:`check` takes, where a forward pass has ``saved`` these values."""
        if self._kept is None:
            memory = {memory_of(value) for value in saved if isinstance(value, Tensor)}
            whole = {name for name, tensor in self._wholes() if memory_of(tensor) in memory}
            places = [(name, *place) for name, place in self._parameters.items()]
            self._kept = [one for one in places if one[0] in whole or memory_of(local_of(one[1][one[2]])) in memory]
        return [table[key]._version for _, table, key in self._kept]

    def check(self, before: Sequence[int]) -> None:
        """Raise InvariantError where one was written into since :meth:`after` gave ``before``."""
        kept = self._kept or []
        now = [table[key]._version for _, table, key in kept]
        behind = list(self._behind())
        if now == before and not behind:
            return
        names = [name for (name, *_), was, is_ in zip(kept, before, now) if was != is_]
        written = [f"'{name}'" for name in dict.fromkeys(names + behind)]
        shown = ", ".join(written[:3])
        more = f" and {len(written) - 3} others" if len(written) > 3 else ""
        raise InvariantError(
            f"{shown}{more} were written into between the forward pass and this backward pass, which computes with "
            "them (torch: modified by an inplace operation)\n"
            "Way out: loss.backward() before optimizer.step(), or call the model again after it. With Plan(recompute=) "
            "backward computes with more parameters than torch's; recompute='none' keeps to its own."
        )


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else 0
