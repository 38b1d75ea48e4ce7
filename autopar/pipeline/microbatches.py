"""One batch in several parts that run one after the other: the cut, and the weight of each part.

A mean over all tokens is not a mean of means where parts have different numbers of tokens: part i has the weight
count_i / (count_1 + ... + count_m), which is known before any backward pass, since counts depend on labels alone. A
loss with a term over the whole batch that is no mean (the balance of a router, a product of two means) has no such
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from autopar.autodiff.partition import extract
from autopar.errors import IndivisibleError, InvariantError, TraceError
from autopar.ir import collectives as comm
from autopar.ir.batch import batch_dims, data_ways
from autopar.ir.node import Node, origin, output_node
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.plan import Plan

aten = torch.ops.aten
PASSING = (aten._to_copy.default, comm.OPS.wait.default)
REDUCING = comm.started_too(comm.REDUCTIONS)
SCALING = (aten.div.Scalar, aten.mul.Scalar, aten.neg.default)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
MEANS = (aten.mean.default, aten.mean.dim)


def parts(
    args: Sequence[Any], kwargs: Mapping[str, Any], mesh: Mesh, plan: Plan, *, local: bool = False
) -> list[dict[str, Any]]:
    """The keyword arguments of each of ``plan.microbatches`` calls: neighbouring rows, as evenly as possible.

    ``local``: the arguments are one rank's part of the batch, not the whole.
    Raises IndivisibleError where there are too few rows, or the data axes do not divide them; InvariantError for
    arguments without names.
    """
    count = plan.microbatches
    if args or any(not isinstance(value, Tensor | int | float | str | None) for value in kwargs.values()):
        raise InvariantError("Plan(microbatches=...) cuts tensors that are passed by name: model.train_step(x=x, y=y)")
    ways = 1 if local else data_ways(mesh)
    cut: dict[str, tuple[Tensor, ...]] = {}
    for name, dim in cut_dims(kwargs, plan).items():
        tensor: Tensor = kwargs[name]
        rows = tensor.shape[dim]
        if rows % ways or rows < count * ways:
            raise IndivisibleError(
                f"input '{name}' has {rows} rows, which {count} microbatches on {mesh} do not divide\n"
                f"Way out: a batch size that is a multiple of {count * ways}, or another Plan(microbatches=...)."
            )
        size, more = divmod(rows // ways, count)
        cut[name] = torch.split(tensor, [(size + (i < more)) * ways for i in range(count)], dim)  # type: ignore[no-untyped-call]
    return [{**kwargs, **{name: pieces[i] for name, pieces in cut.items()}} for i in range(count)]


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


def together(parts: Sequence[Tensor]) -> Tensor:
    """One output of all microbatches: their rows joined; an output without rows is that of the last."""
    return torch.cat(list(parts)) if parts[0].dim() else parts[-1]


def shares(counts: Sequence[Tensor | None], rows: Sequence[int]) -> list[Tensor | float]:
    """The weight of each part's loss in the loss of all: by the counts that divide it, else by its rows."""
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return [part / sum(rows) for part in rows]
    total = sum(known[1:], known[0])
    return [count / total for count in known]


def counting(program: Program) -> fx.Graph | None:
    """The graph (the inputs it needs) -> (the count that divides the loss).

    It is None where the loss is a mean over equally many elements in each part, where the plan weighs parts by their
    rows, and where there is one part. For a pipeline, ``program`` is the stage that has the loss. Raises InvariantError
    for a loss that is no mean: its parts have no weights.
    """
    if program.plan.microbatch_weights == "rows" or program.plan.microbatches == 1:
        return None
    role = program.required_role
    returned = output_node(role.forward).args[0]
    assert isinstance(returned, (tuple, list)) and program.loss is not None
    node = _behind(returned[program.loss], PASSING)
    if node.target is aten.div.Tensor and isinstance(node.args[1], fx.Node):
        count = node.args[1]
        found = ancestors([count])
        sources = [source for source in role.forward.nodes if source in found and source.op == "placeholder"]
        learned = {source.name for source, _ in program.placeholders(InputKind.PARAMETER, InputKind.RECEIVED)}
        if learned.isdisjoint(source.name for source in sources):
            return extract(role.forward, sources, [count])
    if _behind(node, (*PASSING, *REDUCING, *SCALING)).target in MEANS:
        return None
    raise InvariantError(
        f"the loss {_end_of(node)}, which is not one mean over tokens or rows: what each of "
        f"{program.plan.microbatches} microbatches counts for is not known\n"
        'Way out: Plan(microbatch_weights="rows"): the mean of the losses of the microbatches, each over its own rows; '
        "Plan(microbatches=1); or a loss that is one mean."
    )


def _end_of(node: Node) -> str:
    """What the loss ends in: the operator that makes it, or the terms of a sum, with the lines of the model."""
    terms = _terms(node)
    if len(terms) == 1:
        return f"ends in {_named(terms[0])}"
    return f"is a sum of {len(terms)} terms ({'; '.join(map(_named, terms[:4]))}{'; ...' * (len(terms) > 4)})"


def _terms(node: Node) -> list[Node]:
    node = _behind(node, (*PASSING, *REDUCING, *SCALING))
    if node.target not in SUMS:
        return [node]
    return [term for argument in node.all_input_nodes for term in _terms(argument)]


def _named(node: Node) -> str:
    return f"{node.target} at {origin(node).source or origin(node).module or node.name}"


def _behind(node: Any, passing: tuple[Any, ...]) -> Node:
    assert isinstance(node, fx.Node)
    found: Node = node
    while found.target in passing:
        found = found.all_input_nodes[0]
    return found
