"""One batch in several parts that run one after the other: the cut, and what each part counts for.

A mean over all tokens is not a mean of means where parts have different numbers of tokens. The loss of a part is a
summand of that of the batch once it is divided by what the whole batch counts (``weigh_microbatches``): counts depend
on labels alone, so they are known, and added up, before the first forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autopar.errors import IndivisibleError, InvariantError, TraceError
from autopar.ir.batch import batch_dims, data_ways
from autopar.ir.node import origin, output_node
from autopar.ir.operator_facts import runnable
from autopar.ir.program import AnyProgram, Program
from autopar.ir.tables import MIXED, SAME, SHARE, SUM, InputKind, Output, OutputKind, join_key
from autopar.mesh import Mesh
from autopar.plan import Plan


@dataclass(frozen=True)
class Untold:
    """Stands for an output that is made of all rows at once, where there are only parts of it."""

    name: str
    count: int

    def __repr__(self) -> str:
        return (
            f"output '{self.name}' is made of all rows of the batch at once, and {self.count} microbatches do not "
            "tell it"
        )

    def error(self) -> InvariantError:
        return InvariantError(
            f"{self}\nWay out: train_step, which makes no other output than the loss; return it for each row, or as a "
            "sum or a mean over rows; or Plan(microbatches=1)."
        )


class NewBuffers:
    """What the parts of a batch write into buffers, where each reads them as they were before: written at its end."""

    def __init__(self) -> None:
        self._values: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, buffer: Tensor, made: Tensor, join: str) -> None:
        """What one part makes of ``buffer``; see ``Program.joins``."""
        known = self._values.get(id(buffer))
        if known is None:
            self._values[id(buffer)] = buffer, made.detach().clone()
        elif join == SUM:
            known[1].add_(made.detach())

    def write(self) -> None:
        with torch.no_grad():
            for buffer, made in self._values.values():
                buffer.copy_(made)
        self._values.clear()


@dataclass(frozen=True)
class Weight:
    """What one part counts for: ``loss`` multiplies its loss, ``wholes`` are the values of ``InputKind.WHOLE``.

    ``buffers``: takes what it writes into buffers; None where it is all of the batch.
    """

    loss: float
    wholes: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: NewBuffers | None = None


def parts(
    args: Sequence[Any], kwargs: Mapping[str, Any], mesh: Mesh, plan: Plan, *, local: bool = False
) -> list[dict[str, Any]]:
    """The keyword arguments of each of ``plan.microbatches`` calls: neighbouring rows, as evenly as possible.

    The data axes divide the rows of each where they divide those of the batch; else those of a pipeline, whose programs
    are cut into stages alike, have one size. Few rows make fewer microbatches.
    ``local``: the arguments are one rank's part of the batch, not the whole.
    Raises IndivisibleError for a batch without rows; InvariantError for arguments without names.
    """
    count = plan.microbatches
    if args or any(not isinstance(value, Tensor | int | float | str | None) for value in kwargs.values()):
        raise InvariantError(
            "Plan(microbatches=...) cuts tensors that are passed by name\nWay out: model.train_step(x=x, y=y)."
        )
    ways = 1 if local else data_ways(mesh)
    cut: dict[str, tuple[Tensor, ...]] = {}
    dims = cut_dims(kwargs, plan)
    rows = [kwargs[name].shape[dim] for name, dim in dims.items()]
    count = min([count, *(each // ways if each % ways == 0 else each for each in rows)])
    if mesh.is_pipelined and any(each % ways for each in rows):
        count = next(some for some in range(count, 0, -1) if not any(each % some for each in rows))
    if not count:
        raise IndivisibleError("the batch has no rows\nWay out: leave out the call, on every rank.")
    for name, dim in dims.items():
        tensor: Tensor = kwargs[name]
        cut[name] = torch.split(tensor, _sizes(tensor.shape[dim], count, ways), dim)  # type: ignore[no-untyped-call]
    return [{**kwargs, **{name: pieces[i] for name, pieces in cut.items()}} for i in range(count)]


def first_part(kwargs: Mapping[str, Any], mesh: Mesh, plan: Plan) -> Mapping[str, Any]:
    """The call of a program without a pipeline: with ``Plan(microbatches=...)`` the first part of the batch.

    A pipelined program is made of the whole batch. Raises what :func:`parts` raises.
    """
    return kwargs if mesh.is_pipelined or plan.microbatches == 1 else parts((), kwargs, mesh, plan)[0]


def smaller(kwargs: Mapping[str, Any], mesh: Mesh, plan: Plan) -> int:
    """How many parts of a batch have fewer rows than the first."""
    if plan.microbatches == 1:
        return 0
    of_each = rows(kwargs, parts((), kwargs, mesh, plan), plan)
    return sum(count < of_each[0] for count in of_each)


def _sizes(rows: int, count: int, ways: int) -> list[int]:
    """The rows of each of ``count`` parts, of two sizes at most, the larger ones first."""
    unit = ways if rows % ways == 0 else 1
    size, more = divmod(rows // unit, count)
    return [(size + (i < more)) * unit for i in range(count)]


@contextmanager
def explained(whole: Mapping[str, Any], part: Mapping[str, Any], plan: Plan) -> Iterator[None]:
    """Within this context, a model that cannot be called with one microbatch says how the batch was cut."""
    try:
        yield
    except TraceError as problem:
        if plan.microbatches == 1:
            raise
        tensors = {name: tensor for name, tensor in whole.items() if isinstance(tensor, Tensor)}
        lines = [f"  {name} {list(part[name].shape)} of {list(tensor.shape)}" for name, tensor in tensors.items()]
        raise TraceError(
            f"{str(problem).strip()}\nThe model is called with one of {plan.microbatches} microbatches:\n"
            + "\n".join(lines[:6])
            + "\nWay out: say which dim of an input is its batch, Plan(batch_dims={'"
            + f"{next(iter(tensors), 'x')}': 1}}), or None for an input that has none and is not to be cut."
        ) from problem


def cut_dims(kwargs: Mapping[str, Any], plan: Plan) -> dict[str, int]:
    """Name -> batch dim of the tensors that have one."""
    tensors = [(name, value.shape) for name, value in kwargs.items() if isinstance(value, Tensor)]
    dims = batch_dims(tensors, plan.batch_dims)
    return {name: dim for (name, _), dim in zip(tensors, dims) if dim is not None}


def rows(kwargs: Mapping[str, Any], batches: Sequence[Mapping[str, Any]], plan: Plan) -> list[int]:
    """The number of rows of each part of ``kwargs``."""
    name, dim = next(iter(cut_dims(kwargs, plan).items()), ("", 0))
    return [batch[name].shape[dim] if name else 1 for batch in batches]


def weights(program: AnyProgram, counted: Sequence[Sequence[Tensor]], rows: Sequence[int]) -> list[Weight]:
    """What each part counts for; ``counted``: what :func:`counts` gave for each."""
    total = sum(rows)
    buffers = NewBuffers() if len(rows) > 1 else None
    if not program.is_weighed:
        return [Weight(part / total, buffers=buffers) for part in rows]
    sums = {str(number): torch.stack(list(column)).sum(0) for number, column in enumerate(zip(*counted))}
    device = next(iter(sums.values())).device if sums else None
    shares = [torch.tensor(part / total, dtype=torch.float64, device=device) for part in rows]
    return [Weight(1.0, {**sums, SHARE: share}, buffers) for share in shares]


def shares(rows: Sequence[int]) -> list[float]:
    """The fraction of the batch that each part is."""
    return [part / sum(rows) for part in rows]


def counts(program: AnyProgram, inputs: Sequence[Tensor], others: Mapping[str, Tensor], share: float) -> list[Tensor]:
    """What one part contributes to the sums over the batch that ``program`` takes.

    ``inputs``: the user's tensors of the part, whole. ``others``: whole buffers and constants, by name. ``share``: the
    fraction of the batch that the part is.
    """
    if program.counts is None:
        return []
    given = iter(inputs)
    found: dict[fx.Node, Any] = {}
    for node, entry in program.counts.placeholders(*InputKind):
        if entry.kind is InputKind.WHOLE:
            assert entry.target == SHARE, "a sum over the batch needs no other"
            found[node] = torch.tensor(share, dtype=torch.float64)
        else:
            found[node] = next(given) if entry.kind is InputKind.INPUT else others.get(entry.target)
    with torch.no_grad():
        for node in program.counts.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
                assert callable(node.target)
                found[node] = runnable(node.target)(*args, **kwargs)
    returned = output_node(program.counts.graph).args[0]
    assert isinstance(returned, (tuple, list))
    return [found[node] for node in returned if isinstance(node, fx.Node)]


def taken(program: AnyProgram) -> set[str]:
    """The targets of the inputs that :func:`counts` looks at."""
    whole = program.counts
    return set() if whole is None else {entry.target for port, entry in whole.takes(*InputKind) if port.is_used}


def together(name: str, parts: Sequence[Tensor], join: str | None) -> Tensor:
    """The output ``name`` of all microbatches, by ``join``: as ``Program.joins`` has it.

    Raises InvariantError for one that the parts do not tell.
    """
    if join == MIXED:
        raise Untold(name, len(parts)).error()
    if join == SUM:
        return torch.stack(list(parts)).sum(0)
    if join == SAME or not parts[0].dim():
        return parts[-1]
    return torch.cat(list(parts), int(join or 0))


def buffers_together(program: AnyProgram, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The new buffers of a batch, from those that each of its microbatches has made."""
    return {
        name: torch.stack([part[name] for part in parts]).sum(0) if join_of(program, name) == SUM else new
        for name, new in parts[-1].items()
    }


def found_by_next(program: AnyProgram, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the buffers ``made`` by a microbatch that the next one reads."""
    return {name: tensor for name, tensor in made.items() if join_of(program, name) is None}


def join_of(program: AnyProgram, buffer: str) -> str | None:
    return program.joins.get(join_key(Output(OutputKind.BUFFER_UPDATE, buffer)))


def told(name: str, parts: Sequence[Tensor], join: str | None) -> Tensor | Untold:
    """As :func:`together`, with what stands for an output that the parts do not tell."""
    return Untold(name, len(parts)) if join == MIXED else together(name, parts, join)


def normalised(traced: Program) -> frozenset[str]:
    """Modules that normalise by statistics of the whole batch."""
    return frozenset(origin(node).module for node in traced.graph.nodes if "batch_norm" in str(node.target))
