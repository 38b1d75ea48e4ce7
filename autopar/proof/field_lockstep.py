"""All ranks in one process, in the field: :class:`Lockstep` on tensors whose operators are those of the field."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from autopar.ir.node import Node
from autopar.mesh import Mesh
from autopar.proof import (  # noqa: F401 - they register their forms
    field_attention,
    field_complex,
    field_forms,
    field_fourier,
    field_layers,
    field_statistics,
    field_uninterpreted,
    field_windows,
)
from autopar.proof.field import embedded
from autopar.proof.field_reference import COMPOSITES
from autopar.proof.field_tensor import FieldTensor
from autopar.simulator.lockstep import Lockstep, Ranks


class FieldLockstep(Lockstep):
    """Operators and reductions are those of the tensors that are given; no memory is counted.

    ``seen``: where values are kept, by phase and node.
    """

    def __init__(self, mesh: Mesh, seen: dict[str, dict[Node, Ranks]] | None = None) -> None:
        super().__init__(mesh)
        self._seen = seen

    def note(self, node: Node, ranks: Ranks, phase: str) -> None:
        if self._seen is not None:
            self._seen.setdefault(phase, {})[node] = ranks

    def runnable(self, target: Any) -> Callable[..., Any]:
        return COMPOSITES.get(target) or super().runnable(target)

    def weight(self, x: Tensor) -> Tensor:
        """An element of the field: what is computed from plain numbers alone is rounded."""
        if isinstance(x, FieldTensor) or not x.dtype.is_floating_point:
            return x
        return FieldTensor(embedded(x), x.dtype)

    def hold(self, values: Iterable[Ranks]) -> None:
        pass

    def drop(self, values: Iterable[Ranks]) -> None:
        pass
