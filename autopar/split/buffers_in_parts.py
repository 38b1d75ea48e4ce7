"""What becomes of the buffers that forward writes, where a batch runs in several parts, one after the other.

The step is to be that of the whole batch, in which forward runs once. So each part reads the buffers as they were
before the step, and what it writes is

* the same for all parts (a counter of steps, an exponential decay, the vectors of a spectral norm): one is kept;
* a summand (the running mean of what all rows have): the parts are added up, with what is the same for all rows by its
  share, as in a loss;
* the buffer itself and a sum over rows, and nothing else reads it (rows or tokens seen): each part adds its own;
* anything else, of which parts do not tell what the batch would give: that is refused. With
  ``Plan(microbatch_weights="statistics")`` each part then finds what the one before has written, as in accumulating
  gradients by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

import torch

from autopar.errors import InvariantError
from autopar.ir.node import Node, origin, output_node, value
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.tables import SAME, SUM, InputKind, OutputKind
from autopar.split.numbers_of_rows import has_numbers, is_in_proportion, is_moved, numbers_of
from autopar.split.row_sums import Kind, RowSums

aten = torch.ops.aten
ADDING = (aten.add.Tensor, aten.add.Scalar)
Traced = tuple[Program, int]  # and its rows

WAY_OUT = (
    'Way out: Plan(microbatch_weights="statistics"): each microbatch finds what the one before has written, as in '
    "accumulating gradients by hand; or Plan(microbatches=1)."
)


def writes_numbers(program: Program) -> bool:
    """Whether a number is in what ``program`` writes into a buffer: it may be that of the rows."""
    return has_numbers(program, ancestors([node for _, node, _ in _written(program)]))


def joins_of_buffers(
    sums: RowSums, pair: tuple[Traced, Traced] | None, twins: Mapping[str, str]
) -> dict[int, str] | None:
    """Position of a result that is written into a buffer -> ``sum`` or ``same``; none where each part adds its own.

    ``pair``: the program for another number of rows and the one that ``sums`` is of, whose nodes have ``twins`` there;
    None where no number is in what they write. Leaves out of ``sums.shared`` what is added by each part. Gives None,
    and leaves everything there, where there is a buffer that parts do not tell and the plan takes the statistics of
    each; else raises InvariantError for it.
    """
    program = sums.flow.program
    moved = _moved(*pair, twins) if pair is not None else {}
    found: dict[int, str] = {}
    added: list[Node] = []
    for place, node, target in _written(program):
        cone = ancestors([node])
        others = [at for at in cone if at.name in moved]
        kind = sums.of(node).kind
        in_proportion = others == [node] and moved[node.name]
        if _adds_its_own(program, node, target) and (in_proportion or (kind is Kind.SUM and not others)):
            added.append(node)
            continue
        join = {Kind.SUM: SUM, Kind.SAME: SAME}.get(kind)
        has_statistics = any(user in cone for user, _ in sums.statistics)
        if join is None or has_statistics or others or (join == SUM and not value(node).dtype.is_floating_point):
            if program.plan.microbatch_weights == "statistics":
                return None
            raise InvariantError(_refusal(program, target, others[0] if others else sums.of(node).mixed_at or node))
        found[place] = join
    for user in added:
        for pair_of in [one for one in sums.shared if one[0] is user]:
            del sums.shared[pair_of]
    return found


def of_buffers_alone(sums: RowSums, others: Set[Node]) -> set[Node]:
    """What nothing but buffers depends on, which each part writes by itself: no part of it is weighed.

    ``others``: what is not weighed anyway. Raises InvariantError for what is weighed for a loss and written as well.
    """
    program = sums.flow.program
    written = {node for _, node, _ in _written(program)}
    useful = ancestors([node for node in program.returned if node not in written])
    found = ancestors(written)
    changed = {*sums.shares, *(user for user, _ in (*sums.wholes, *sums.shared))} - others
    for node in changed & found & useful:
        raise InvariantError(
            f"{node.target} at {origin(node).source or node.name} goes into the loss, or an output, of the batch and "
            "into a buffer of each microbatch; it cannot be both\nWay out: compute it twice, once for each."
        )
    return found - useful


def refuse_one_number_of_rows(program: Program, rows: int, problem: InvariantError) -> None:
    """Raise InvariantError where it is not known whether numbers in what is written are those of the rows."""
    if program.plan.microbatch_weights != "statistics":
        raise InvariantError(
            f"the model takes a batch of {rows} rows and no other, so that it is not known whether a number that it "
            f"writes into a buffer is that of the rows\n{WAY_OUT}"
        ) from problem


def _written(program: Program) -> Iterator[tuple[int, Node, str]]:
    for place, (node, entry) in enumerate(zip(program.returned, program.outputs)):
        if entry.kind is OutputKind.BUFFER_UPDATE:
            yield place, node, entry.target


def _adds_its_own(program: Program, node: Node, target: str) -> bool:
    """Whether ``node`` is buffer ``target`` and something else, and nobody else reads the buffer or this."""
    if node.target not in ADDING or node.kwargs:
        return False
    if set(node.users) != {output_node(program.graph)} or program.returned.count(node) > 1:
        return False  # who reads the new value wants that of the batch
    own = next((at for at, entry in program.placeholders(InputKind.BUFFER) if target in entry.names), None)
    return node.args[0] is own and own is not None and list(own.users) == [node] and node.args[1] is not own


def _moved(one: Traced, two: Traced, twins: Mapping[str, str]) -> dict[str, bool]:
    """The nodes of the second program that compute with another number than their twin; whether as the rows do."""
    (first, rows), (second, others) = one, two
    mine = {node.name: node for node in first.graph.nodes}
    found: dict[str, bool] = {}
    for theirs in second.graph.nodes:
        twin = mine.get(twins.get(theirs.name, ""))
        if theirs.op != "call_function" or twin is None:
            continue
        numbers, now = list(numbers_of(first, twin)), list(numbers_of(second, theirs))
        if len(numbers) != len(now) or any(map(is_moved, numbers, now)):
            alike = len(numbers) == len(now)
            found[theirs.name] = alike and all(is_in_proportion(a, rows, b, others) for a, b in zip(numbers, now))
    return found


def _refusal(program: Program, target: str, node: Node) -> str:
    where = f"{node.target} at {origin(node).source or origin(node).module or node.name}"
    return (
        f"buffer '{target}' is not made of sums and means over the rows of the batch: {where} is computed of all rows "
        f"at once, and of the rows of each of {program.plan.microbatches} microbatches it is another value\n{WAY_OUT}"
    )
