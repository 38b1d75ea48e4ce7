"""All ranks of a mesh in one process, node by node: each value is a list with one tensor per rank.

``collective`` computes every communication operator over the parts that the members of one group hold; ``Lockstep``
runs whole graphs. Ranks that hold the very same tensor share the work on it.

Parts are cut and joined by the indices that their owners have, plainly, and not by the faster code of the runtime
(:mod:`autopar.communication.pieces`), on purpose: the runtime is tested against the simulator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.errors import AutoparError, InvariantError
from autopar.ir import collectives as comm
from autopar.ir.layout import Split, owned_indices
from autopar.ir.load import ExpertLoad, Tally
from autopar.ir.node import Node, last_uses, origin, repeated
from autopar.ir.operator_facts import is_random, runnable
from autopar.ir.traffic import Transfer, moved_bytes
from autopar.mesh import Mesh

Ranks = list[Any]  # one value per rank

# ---------------------------------------------------------------- collectives over the parts of one group


def collective(name: str, parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    """The result of ``comm.<name>(part, *arguments)`` on each member of a group; ``parts`` in axis order."""
    return RULES[comm.STARTED.get(name, name)](parts, arguments)


def join(parts: Sequence[Tensor], split: Split, length: int) -> Tensor:
    """The whole of ``length`` elements along ``split.dim``; padding of an uneven split is dropped."""
    shape = list(parts[0].shape)
    shape[split.dim] = length
    whole = parts[0].new_empty(shape)
    for position, part in enumerate(parts):
        owned = owned_indices(length, split, position, len(parts)).to(part.device)
        whole.index_copy_(split.dim, owned, part.narrow(split.dim, 0, len(owned)))
    return whole


def take(whole: Tensor, split: Split, position: int, ways: int) -> Tensor:
    """The part of ``position``; a short one is padded with zeros to ceil(length / ways)."""
    length = whole.shape[split.dim]
    owned = owned_indices(length, split, position, ways).to(whole.device)
    part = whole.index_select(split.dim, owned)
    missing = -(-length // ways) - len(owned)
    if missing:
        shape = list(part.shape)
        shape[split.dim] = missing
        part = torch.cat([part, part.new_zeros(shape)], split.dim)
    return part


def _put(part: Tensor, split: Split, position: int, ways: int, length: int) -> Tensor:
    shape = list(part.shape)
    shape[split.dim] = length
    owned = owned_indices(length, split, position, ways).to(part.device)
    return part.new_zeros(shape).index_copy_(split.dim, owned, part.narrow(split.dim, 0, len(owned)))


def _reduced(parts: Sequence[Tensor], op: str) -> Tensor:
    combine = REDUCTIONS[op]
    total = parts[0].contiguous()
    for part in parts[1:]:
        total = combine(total, part)
    return total


def _same(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    return list(parts)


def _keep_first(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    return [parts[0].contiguous(), *(torch.zeros(part.shape, dtype=part.dtype) for part in parts[1:])]


def _all_reduce(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    return [_reduced(parts, arguments[1])] * len(parts)


def _all_gather(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    return [join(parts, comm.split_of(arguments), arguments[5])] * len(parts)


def _reduce_scatter(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    total = _reduced(parts, "sum")
    return [take(total, comm.split_of(arguments), position, len(parts)) for position in range(len(parts))]


def _split(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    return [take(part, comm.split_of(arguments), position, len(parts)) for position, part in enumerate(parts)]


def _pad(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    split, length = comm.split_of(arguments), arguments[5]
    return [_put(part, split, position, len(parts), length) for position, part in enumerate(parts)]


def _all_to_all(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    source, target = comm.end_of(arguments[2]), comm.end_of(arguments[3])
    whole = join(parts, source, parts[0].shape[source.dim] * len(parts))
    return [take(whole, target, position, len(parts)) for position in range(len(parts))]


def _shift(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    return [parts[(position - arguments[2]) % len(parts)].contiguous() for position in range(len(parts))]


def _exchange_rows(parts: Sequence[Tensor], arguments: Sequence[Any]) -> list[Tensor]:
    """``send`` and ``receive`` of the arguments are those of each member."""
    send, receive = arguments[2:]
    blocks = [torch.split_with_sizes(part, counts.tolist()) for part, counts in zip(parts, send)]
    return [
        torch.cat([own[position].narrow(0, 0, rows) for own, rows in zip(blocks, counts.tolist(), strict=True)])
        for position, counts in enumerate(receive)
    ]


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}

RULES: dict[str, Callable[[Sequence[Tensor], Sequence[Any]], list[Tensor]]] = {
    "enter": _same,
    "release": _same,
    "keep_first": _keep_first,
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "pad": _pad,
    "reduce_scatter": _reduce_scatter,
    "split": _split,
    "split_replicated": _split,
    "all_to_all": _all_to_all,
    "reorder": _all_to_all,
    "shift": _shift,
    "dispatch_rows": _exchange_rows,
    "return_rows": _exchange_rows,
    "tally": _same,
    "wait": _same,
}

# ---------------------------------------------------------------- memory


@dataclass
class Memory:
    """Bytes of distinct live storage to which one rank refers, counted as its values come and go."""

    users: Counter[int] = field(default_factory=Counter)
    live: int = 0
    peak: int = 0

    def hold(self, value: Any) -> None:
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            self.users[storage.data_ptr()] += 1
            if self.users[storage.data_ptr()] == 1:
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def release(self, value: Any) -> None:
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            self.users[storage.data_ptr()] -= 1
            if self.users[storage.data_ptr()] == 0:
                del self.users[storage.data_ptr()]
                self.live -= storage.nbytes()


# of operators and collectives, for operands that do not fit
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for item in pytree.tree_leaves(value) if isinstance(item, Tensor)]


# ---------------------------------------------------------------- graphs


class _Differentiable(torch.autograd.Function):
    """A collective over the parts of one group; its backward is the dual collective."""

    @staticmethod
    def forward(ctx: Any, name: str, arguments: tuple[Any, ...], *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.name, ctx.arguments = name, arguments
        return tuple(part.clone() for part in collective(name, parts, arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        name, arguments = comm.dual_of(ctx.name, ctx.arguments)
        return (None, None, *(part.clone() for part in collective(name, grads, arguments)))


class Lockstep:
    """Runs graphs on all ranks of ``mesh`` at once and counts the bytes that they send and hold.

    Rows for experts count as those of the rank that sends most in that exchange; all else is the same on all ranks.

    ``gradients``: torch's autograd may go backward through the run, with collectives as their duals.
    """

    def __init__(self, mesh: Mesh, *, gradients: bool = False) -> None:
        self.mesh, self.gradients = mesh, gradients
        self.memory = [Memory() for _ in range(mesh.world_size)]
        self._groups: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._sent: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._loads: dict[str, tuple[Tally, list[Tensor]]] = {}  # layer -> its tally, and the counts of each rank

    @property
    def traffic(self) -> tuple[Transfer, ...]:
        return tuple(Transfer(*key, *counts) for key, counts in self._sent.items())

    @property
    def loads(self) -> dict[str, ExpertLoad]:
        """The load of the experts of each layer that was counted."""
        found = {}
        for layer, (tally, counts) in self._loads.items():
            members = self.groups(tally.axis)[0]
            found[layer] = tally.load(self.mesh, torch.cat([counts[rank] for rank in members]))
        return found

    def weight(self, x: Tensor) -> Tensor:
        """``x``, what a microbatch counts for in its batch, as this kind of run computes with it."""
        return x

    def run(self, graph: fx.Graph, inputs: list[Ranks], phase: str = "forward") -> list[Ranks]:
        """Run ``graph``; ``inputs`` has one entry per placeholder and is emptied, so that values die at last use.

        Raises InvariantError, naming the node, where an operator fails on some rank.
        """
        known: dict[Node, Ranks] = {}
        waiting = inputs[::-1]
        inputs.clear()
        dying = last_uses(graph)
        for node in graph.nodes:
            if node.op == "output":
                results = list(node.args[0])
                self.hold(known[result] for result in repeated(results))
                return [known[result] for result in results]
            known[node] = waiting.pop() if node.op == "placeholder" else self._step(node, known, phase)
            self.note(node, known[node], phase)
            self.hold([known[node]])
            for dead in dying.get(node, ()):
                self.drop([known.pop(dead)])
        raise AssertionError("a graph ends with its output")

    def note(self, node: Node, ranks: Ranks, phase: str) -> None:
        """Called with each value as it is known, for who wants to look at it."""

    def hold(self, values: Iterable[Ranks]) -> None:
        """Count values as alive until they are dropped; the results of :meth:`run` are counted so, each by itself."""
        for ranks in values:
            for memory, value in zip(self.memory, ranks):
                memory.hold(value)

    @contextmanager
    def holding(self, values: Iterable[Ranks]) -> Iterator[None]:
        """Within this context, ``values`` stay in memory, as parameters and inputs do for a whole step."""
        kept = list(values)
        self.hold(kept)
        yield
        self.drop(kept)

    def drop(self, values: Iterable[Ranks]) -> None:
        for ranks in values:
            for memory, value in zip(self.memory, ranks):
                memory.release(value)

    def runnable(self, target: Any) -> Callable[..., Any]:
        """What computes an operator."""
        found: Callable[..., Any] = runnable(target)
        return found

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of ranks that communicate over ``axis``."""
        if axis not in self._groups:
            self._groups[axis] = tuple(self.mesh.groups(axis))
        return self._groups[axis]

    def count(self, phase: str, axis: str, name: str, operations: int, sent: int) -> None:
        """Add to the traffic of each rank."""
        before = self._sent.get((phase, axis, name), (0, 0))
        self._sent[phase, axis, name] = before[0] + operations, before[1] + sent

    def _step(self, node: Node, known: dict[Node, Ranks], phase: str) -> Ranks:
        assert node.op == "call_function", node.format_node()
        name = comm.TARGETS.get(node.target)  # type: ignore[call-overload]
        if name == "axis_index":
            ranks = map(self.mesh.coordinates, range(self.mesh.world_size))
            return [torch.tensor(self.mesh.position(str(node.args[0]), here)) for here in ranks]
        if name is not None:
            return self._communicate(name, node, known, phase)
        done: dict[Any, Any] = {}
        results: Ranks = []
        for rank in range(self.mesh.world_size):
            here = {source: known[source][rank] for source in node.all_input_nodes}
            key = tuple(map(id, here.values()))
            if is_random(node.target) or key not in done:
                done[key] = _call(self.runnable(node.target), node, here, rank)
            results.append(done[key])
        return results

    def _communicate(self, name: str, node: Node, known: dict[Node, Ranks], phase: str) -> Ranks:
        source, axis, *rest = comm.arguments_of(node).values()
        parts = known[source]
        results: Ranks = [None] * self.mesh.world_size
        for group in self.groups(axis):
            own = [parts[rank] for rank in group]
            given = (axis, *([known[x][rank] for rank in group] if isinstance(x, Node) else x for x in rest))
            try:
                if self.gradients:
                    members = _Differentiable.apply(name, given, *own)  # type: ignore[no-untyped-call]
                else:
                    members = collective(name, own, given)
            except AutoparError:
                raise
            except FAILURES as problem:
                raise _failed(node, group[0], own, problem) from problem
            for rank, result in zip(group, members):
                results[rank] = result
        if name == "tally":
            self._note(axis, known[rest[0]], *rest[1:])
        moving = comm.moving(node.target)
        if moving is not None and not comm.is_idle(node, self.mesh):
            size = parts[0].numel() * parts[0].element_size()
            sent = moved_bytes(moving, self.mesh.size(axis), size)
            if node.target in comm.started_too(comm.ROUTES):
                sent = max(self._leaving(axis, rank, parts[rank], known[rest[1]][rank]) for rank in range(len(parts)))
            self.count(phase, axis, moving, 1, sent)
        return results

    def _note(self, axis: str, counts: Ranks, layer: str, group: str, places: Sequence[int]) -> None:
        before = self._loads[layer][1] if layer in self._loads else [torch.zeros_like(own) for own in counts]
        self._loads[layer] = Tally(axis, group, tuple(places)), [a + b for a, b in zip(before, counts)]

    def _leaving(self, axis: str, rank: int, rows: Tensor, send: Tensor) -> int:
        """Bytes of the rows that leave a rank."""
        kept = int(send[self.mesh.position(axis, self.mesh.coordinates(rank))])
        return (len(rows) - kept) * rows[:1].numel() * rows.element_size()


def _call(function: Callable[..., Any], node: Node, here: dict[Node, Any], rank: int) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), here.__getitem__)
    try:
        return function(*args, **kwargs)
    except AutoparError:
        raise
    except FAILURES as problem:
        raise _failed(node, rank, _tensors((args, kwargs)), problem) from problem


def _failed(node: Node, rank: int, operands: Iterable[Tensor], problem: Exception) -> InvariantError:
    shapes = [list(tensor.shape) for tensor in operands]
    where = f" (from {origin(node).module})" if origin(node).module else ""
    first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    return InvariantError(f"rank {rank}: {node.name} = {node.target}{where} failed on shapes {shapes}: {first}")
