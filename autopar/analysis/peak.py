"""The most bytes that a rank holds in a step, from its graphs: they run on tensors without memory, so any size will do.

What is counted is what :mod:`autopar.simulator.lockstep` counts of real tensors: distinct storages of the values that
are alive between two lines. What a kernel needs within a line is not, and the emitted code, which writes into values
that die, may need less. With ``Plan(zero=1)`` and ``2`` the whole parameters count as gathered in this step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.autodiff.recorder import fake_mode
from autopar.ir import collectives as comm
from autopar.ir.node import Node, last_uses, value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind, Role

WAIT = comm.OPS.wait.default


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank. ``resident``: parameters, buffers, constants and inputs, which stay for the whole step. Beyond
    these: what is ``kept`` after forward, outputs included, and the most in ``forward`` and in ``backward``."""

    resident: int
    kept: int
    forward: int
    backward: int

    @property
    def activations(self) -> int:
        return max(self.forward, self.backward)

    @property
    def total(self) -> int:
        return self.resident + self.activations


def peak(program: Program) -> Peak:
    """Of a step of a differentiated program; all ranks hold the same."""
    role, memory = program.required_role, _Memory()
    with fake_mode(), torch.no_grad():
        inputs = [_empty(program, node) for node, _ in program.placeholders(*InputKind)]
        memory.hold(inputs)
        resident = memory.restart()
        found = _run(role.forward, inputs, memory)
        forward = memory.restart() - resident
        outputs, saved = found[: len(program.outputs)], found[len(program.outputs) :]
        kept = memory.live - resident
        if role.backward is None:
            return Peak(resident, kept, forward, 0)
        memory.release(saved)  # from now on the backward graph holds them
        _run(role.backward, [*saved, *_tangents(role, outputs)], memory)
    return Peak(resident, kept, forward, memory.most - resident)


def _empty(program: Program, node: Node) -> Tensor:
    kind = value(node)
    return torch.empty(kind.layout.local_shape(program.mesh), dtype=kind.dtype)


def _tangents(role: Role, outputs: list[Tensor]) -> list[Tensor]:
    return [torch.empty(outputs[place].shape, dtype=outputs[place].dtype) for place in role.differentiable]


@dataclass
class _Memory:
    """Bytes of distinct storages, as values come and go; ``most`` since the last restart."""

    users: Counter[int] = field(default_factory=Counter)
    live: int = 0
    most: int = 0

    def hold(self, values: Iterable[Any]) -> None:
        for storage in _storages(values):
            self.users[storage._cdata] += 1
            if self.users[storage._cdata] == 1:
                self.live += storage.nbytes()
        self.most = max(self.most, self.live)

    def release(self, values: Iterable[Any]) -> None:
        for storage in _storages(values):
            self.users[storage._cdata] -= 1
            if not self.users[storage._cdata]:
                del self.users[storage._cdata]
                self.live -= storage.nbytes()

    def restart(self) -> int:
        """The most until now."""
        most, self.most = self.most, self.live
        return most


def _storages(values: Iterable[Any]) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]


def _run(graph: fx.Graph, inputs: list[Tensor], memory: _Memory) -> list[Tensor]:
    """The results of ``graph``, which ``memory`` counts as held; so are inputs, until their last use."""
    known: dict[Node, Any] = {}
    waiting, dying = inputs[::-1], last_uses(graph)
    for node in graph.nodes:
        if node.op == "output":
            return [known[result] for result in node.args[0]]
        known[node] = waiting.pop() if node.op == "placeholder" else _called(node, known)
        memory.hold([known[node]])
        for dead in dying.get(node, ()):
            memory.release([known.pop(dead)])
    raise AssertionError("a graph ends with its output")


def _called(node: Node, known: dict[Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    return args[0] if node.target is WAIT else node.target(*args, **kwargs)  # type: ignore[operator]
