"""Whole parameters that stay on every rank between optimizer steps (``Plan(zero=1)`` and ``2``).

They are gathered when an optimizer has changed the parts of this rank, each of which then lies inside the whole one, so
that nothing is held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar import comm
from autopar.emit import last_uses
from autopar.once import Gathering
from autopar.pieces import padded
from autopar.program import Node, output_node, value
from autopar.runtime import Communicator
from autopar.torch_dtensor import keep_within, local_of

Find = Callable[[], Tensor]  # the parameter of the module, a DTensor


class Gathered:
    """The whole parameters of one program; ``parameters`` are those that ``gathering.parameters`` names."""

    def __init__(self, gathering: Gathering, parameters: Sequence[Find], communicator: Communicator) -> None:
        self.gathering, self.comm = gathering, communicator
        self._parameters = dict(zip(gathering.parameters, parameters))
        self._held: list[Tensor] = []
        self._state: list[tuple[int, ...]] = []  # of the parts when they were gathered

    def tensors(self) -> list[Tensor]:
        """The whole parameters as they are now; collective after an optimizer step, which every rank makes."""
        if not self._held or self._now() != self._state:
            with torch.no_grad():
                self._gather()
            self._state = self._now()
        return self._held

    def _now(self) -> list[tuple[int, ...]]:
        """What changes when a part is written to: through the DTensor the first number, past it the others."""
        parameters = [find() for find in self._parameters.values()]
        parts = [local_of(parameter) for parameter in parameters]
        return [(whole._version, part._version, part.data_ptr()) for whole, part in zip(parameters, parts)]

    def _gather(self) -> None:
        """One after the other: what was held goes as soon as the new one is there."""
        graph = self.gathering.graph
        results = output_node(graph).all_input_nodes
        owners, old = dict(zip(results, self.gathering.owners)), dict(zip(results, self._held))
        self._held = []
        held: dict[Node, Tensor] = {}
        dying = last_uses(graph)
        for node in graph.nodes:
            if node.op == "output":
                break
            held[node] = self._result(node, held)
            if node in owners:
                old.pop(node, None)
                self._put_within(owners[node], held[node])
            for dead in dying.get(node, ()):
                held.pop(dead, None)
        self._held = [held[node] for node in results]

    def _result(self, node: Node, held: dict[Node, Tensor]) -> Tensor:
        if node.op == "placeholder":
            part = local_of(self._parameters[node.name]())
            return padded(part, value(node).layout.local_shape(self.comm.mesh))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), held.__getitem__)
        name = comm.TARGETS.get(node.target)  # type: ignore[call-overload]
        call: Any = node.target if name is None else getattr(self.comm, name)
        result: Tensor = call(*args, **kwargs)
        return result

    def _put_within(self, owner: tuple[str, str] | None, whole: Tensor) -> None:
        """Let this rank's part be memory of ``whole``, where it is a piece of it."""
        if owner is None:
            return
        name, axis = owner
        parameter = self._parameters[name]()
        rows = local_of(parameter).shape[0]
        if rows * self.comm.mesh.size(axis) == whole.shape[0]:
            keep_within(parameter, whole.narrow(0, self.comm.coordinates[axis] * rows, rows))
