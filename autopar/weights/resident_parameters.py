"""Whole parameters that stay on every rank between optimizer steps (``Plan(zero=1)`` and ``2``).

They are gathered when an optimizer has changed the parts of this rank. Each part then becomes memory of the whole
parameter, so that nothing is held twice; from then on they are gathered in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.autodiff.hoist import Gathers
from autopar.communication.communicator import Communicator
from autopar.communication.pieces import padded
from autopar.dtensors.dtensor import keep_within, local_of
from autopar.dtensors.dtensor_habits import is_behind, is_shown, note_gathered, state_of_part
from autopar.ir import collectives as comm
from autopar.ir.node import Node, last_uses, origin, output_node, value
from autopar.weights.identity import optimizer_steps

Find = Callable[[], Tensor]  # the parameter of the module, a DTensor


class Gathered:
    """The whole parameters of one program; ``parameters`` are those that ``gathering.parameters`` names."""

    def __init__(self, gathering: Gathers, parameters: Sequence[Find], communicator: Communicator) -> None:
        self.gathering, self.comm = gathering, communicator
        self._parameters = dict(zip(gathering.parameters, parameters))
        self._held: list[Tensor] = []
        self._state: list[tuple[int, ...]] = []  # of the parts when they were gathered

    def tensors(self) -> list[Tensor]:
        """The whole parameters as they are now; collective after an optimizer step, which every rank makes."""
        self.comm.agreement.settle()  # this is decided alike on all ranks
        if not self._held or self._now() != self._state:
            with torch.no_grad():
                self._gather()
                for find in self._parameters.values():
                    note_gathered(find())
            self._state = self._now()
        return self._held

    def wholes(self) -> Iterator[tuple[str, Tensor]]:
        """The whole parameters as they are held, each with the name of that which is a piece of it."""
        for owner, whole in zip(self.gathering.owners, self._held):
            if owner is not None:
                yield owner[0], whole

    def behind(self) -> Iterator[str]:
        """Parameters of which parts were written to past their DTensors since they were gathered, by their nodes."""
        return (name for name, find in self._parameters.items() if is_behind(find()))

    def _now(self) -> list[tuple[int, ...]]:
        """A state that changes when a part is written to: the first number through the DTensor, the others past it.

        What ``part.data.add_(...)`` does to a part shows in no number. It belongs to the step of an optimizer, or it is
        done by a script that has been shown the part: after a backward pass, or where a rank sees other numbers in it.
        """
        parameters = [find() for find in self._parameters.values()]
        states = [(whole._version, *state_of_part(whole)) for whole in parameters]
        by_hand = self.comm.updates if self.comm.agreement.noted else 0
        return [(by_hand, self.comm.agreement.times_noted, optimizer_steps()), *states]

    def _gather(self) -> None:
        """Gather one after the other: an earlier whole one is written to, or freed once the new one is available."""
        graph = self.gathering.graph
        results = output_node(graph).all_input_nodes
        owners, old = dict(zip(results, self.gathering.owners)), dict(zip(results, self._held))
        self._held = []
        places = {_gather_of(node): old[node] for node in results if self._lies_within(owners[node], old.get(node))}
        held: dict[Node, Tensor] = {}
        dying = last_uses(graph)
        for node in graph.nodes:
            if node.op == "output":
                break
            held[node] = self._result(node, held, places.pop(node, None))
            if node in owners:
                old.pop(node, None)
                self._put_within(owners[node], held[node])
            for dead in dying.get(node, ()):
                held.pop(dead, None)
        self._held = [held[node] for node in results]

    def _result(self, node: Node, held: dict[Node, Tensor], place: Tensor | None) -> Tensor:
        """The result of ``node``, written to ``place`` if that is given."""
        if node.op == "placeholder":
            part = local_of(self._parameters[node.name]())
            return padded(part, value(node).layout.local_shape(self.comm.mesh))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), held.__getitem__)
        name = comm.TARGETS.get(node.target)  # type: ignore[call-overload]
        if self.comm.recorder is not None:
            self.comm.recorder.called(node.name, origin(node).module)
        if place is not None:
            own: Any = args[0]
            axis = str(args[1])
            started = self.comm.start_all_gather_into(place, own, axis)
            return started if name in comm.STARTED else self.comm.wait(started, axis)
        call: Any = node.target if name is None else getattr(self.comm, name)
        result: Tensor = call(*args, **kwargs)
        return result

    def _put_within(self, owner: tuple[str, str] | None, whole: Tensor) -> None:
        """Make this rank's part memory of ``whole``, where it is a piece of it and nobody may hold its old memory."""
        if owner is None or (place := self._place(owner, whole)) is None:
            return
        if not is_shown(parameter := self._parameters[owner[0]]()):
            keep_within(parameter, place)

    def _lies_within(self, owner: tuple[str, str] | None, whole: Tensor | None) -> bool:
        """Whether :meth:`_put_within` has been called, and the parameter has had no other memory since."""
        if owner is None or whole is None:
            return False
        part, place = local_of(self._parameters[owner[0]]()), self._place(owner, whole)
        return place is not None and part.data_ptr() == place.data_ptr() and part.stride() == place.stride()

    def _place(self, owner: tuple[str, str], whole: Tensor) -> Tensor | None:
        """The position of this rank's part in ``whole``; None where parts are uneven."""
        name, axis = owner
        rows = local_of(self._parameters[name]()).shape[0]
        if rows * self.comm.mesh.size(axis) != whole.shape[0]:
            return None
        return whole.narrow(0, self.comm.position(axis) * rows, rows)


def _gather_of(node: Node) -> Node:
    """The gather that makes ``node``: the node itself, or the one for which it waits."""
    return node if node.target is not comm.OPS.wait.default else node.all_input_nodes[0]
