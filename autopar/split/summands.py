"""What the graph of a microbatch needs so that its loss is a summand of the loss of the whole batch.

A trace does not tell what a number in the model depends on: ``sum() / 4`` may be a constant or ``sum() / len(x)``.
Where it matters, the model is traced with another number of rows (``Pins.of_rows``), and the numbers are compared.
So it is with a microbatch of one row, of which nothing can be split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from autopar.errors import InvariantError, TraceError
from autopar.ir.node import Node, origin, output_node
from autopar.ir.operator_facts import is_view
from autopar.ir.program import Program
from autopar.ir.reach import ancestors
from autopar.ir.tables import MIXED, SAME, SUM, OutputKind
from autopar.mesh import Mesh
from autopar.split.buffers_in_parts import (
    Traced,
    joins_of_buffers,
    of_buffers_alone,
    refuse_one_number_of_rows,
    writes_numbers,
)
from autopar.split.flow import key_of
from autopar.split.numbers_of_rows import (
    constant_names,
    has_numbers,
    is_in_proportion,
    is_moved,
    numbers_of,
    operands_of,
    shown,
)
from autopar.split.row_sums import SAME as SAME_ROWS
from autopar.split.row_sums import Kind, Rows, RowSums, row_sums

aten = torch.ops.aten
AXIS = "dp"
SCALING = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
TAKING = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
DIVIDING = (aten.div.Tensor, aten.div.Scalar)
MANY = 4  # rows of which each of two parts has several


@dataclass(frozen=True)
class Summands:
    """As :class:`RowSums` has them, by the names of nodes: another trace may have told it.

    Attributes:
        wholes: (user, operand): the user needs the operand of the whole batch.
        shares: nodes that count for a part in proportion to its rows; twice, where they are listed twice.
        shared: (user, operand): so does the operand for that user.
        joins: position of an output -> ``sum``, ``same``, ``mixed`` or the dim of its rows; of a buffer, see
            :func:`autopar.split.buffers_in_parts.joins_of_buffers`.
    """

    wholes: tuple[tuple[str, str], ...]
    shares: tuple[str, ...]
    shared: tuple[tuple[str, str], ...]
    joins: Mapping[int, str]


def summands(program: Program, rows: int, of_rows: Callable[[int], Program] | None) -> Summands:
    """What ``program``, of a microbatch with ``rows`` rows, needs. Raises InvariantError for a loss that is no sum.

    ``of_rows`` gives the same program for another number of rows.
    """
    looked_at, many, twins, is_limited = _looked_at(program, rows, of_rows)
    sums = _row_sums(looked_at, many, rows)
    if _loss_is(sums, Kind.MIXED) and program.plan.microbatch_weights == "statistics":
        returned = sums.flow.program.returned[program.loss or 0]
        sums.found[key_of(returned)] = SAME_ROWS
        sums.statistics[output_node(sums.flow.program.graph), returned] = None
    if _loss_is(sums, Kind.MIXED) or _loss_is(sums, Kind.ROWS):
        raise InvariantError(_refusal(program, sums.of(sums.flow.program.returned[program.loss or 0])))
    proportional: list[str] = []
    asks = looked_at is not program or (program.loss is not None and (is_limited or _depends_on_numbers(sums)))
    pair: tuple[Traced, Traced] | None = None
    names, is_told = twins, True
    if looked_at is not program:
        pair = (program, rows), (looked_at, many)
    elif asks or writes_numbers(program):
        try:
            pair = _another(of_rows, rows), (program, rows)
            names = _twins(*pair)
        except InvariantError as problem:
            if asks:
                raise
            refuse_one_number_of_rows(program, rows, problem)
            pair, is_told = None, False
    if pair is not None and asks:
        proportional = _proportional(*pair, names, sums)
    buffers = joins_of_buffers(sums, pair, names) if is_told else None
    alone = _of_statistics_alone(sums) if sums.statistics else set()
    if buffers is None:  # each part finds what the one before has written
        alone |= of_buffers_alone(sums, alone)
    return Summands(
        tuple((twins[user.name], twins[operand.name]) for user, operand in sums.wholes if user not in alone),
        tuple(twins[name] for name in (*(node.name for node in sums.shares if node not in alone), *proportional)),
        tuple((twins[user.name], twins[operand.name]) for user, operand in sums.shared if user not in alone),
        dict(_joins(sums)) | (buffers or {}),
    )


def _looked_at(
    program: Program, rows: int, of_rows: Callable[[int], Program] | None
) -> tuple[Program, int, dict[str, str], bool]:
    """The program that tells what becomes of rows, their number, and the names of its nodes in ``program``.

    It has twice as many rows: a model may take them in groups, and a single group does not show which dim has the rows.
    Last, whether it is ``program`` itself because the model does not take so many.
    """
    own = {node.name: node.name for node in program.graph.nodes}
    if rows > 1 and (program.loss is None or of_rows is None):
        return program, rows, own, False
    many = max(MANY, 2 * rows)
    try:
        looked_at = _of(of_rows, many)
    except TraceError:
        if rows == 1:
            raise
        return program, rows, own, has_numbers(program, ancestors([program.returned[program.loss or 0]]))
    try:
        return looked_at, many, _twins((program, rows), (looked_at, many)), False
    except InvariantError:
        # a loop over rows is written out; without numbers, none of them can be made of how many there are
        if rows == 1 or has_numbers(program, ancestors([program.returned[program.loss or 0]])):
            raise
        if _takes_other_parts((program, rows), (looked_at, many)):
            raise
    return program, rows, own, False


def _takes_other_parts(one: Traced, two: Traced) -> bool:
    """Whether a part of some rows (``x[:3]``) is all of a smaller batch, and is not written there.

    A loop over rows writes as many calls for each row.
    """
    (first, rows), (second, others) = one, two
    mine, its = (Counter(node.target for node in program.graph.nodes) for program in (first, second))
    return any((its[each] - mine[each]) % (others - rows) or bool(mine[each]) != bool(its[each]) for each in TAKING)


def _another(of_rows: Callable[[int], Program] | None, rows: int) -> tuple[Program, int]:
    """The program of twice as many rows, or of half as many where the model takes no more; and their number."""
    try:
        return _of(of_rows, 2 * rows), 2 * rows
    except TraceError:
        if rows == 1:
            raise
    try:
        return _of(of_rows, rows // 2), rows // 2
    except TraceError as problem:
        raise InvariantError(
            f"the model takes a batch of {rows} rows, and none of {2 * rows} or {rows // 2}, so that what a microbatch "
            f"counts for in the loss is not known\n{WAY_OUT}"
        ) from problem


def _loss_is(sums: RowSums, kind: Kind) -> bool:
    program = sums.flow.program
    return program.loss is not None and sums.of(program.returned[program.loss]).kind is kind


def _loss_cone(sums: RowSums) -> set[Node]:
    program = sums.flow.program
    found = ancestors([program.returned[program.loss]]) if program.loss is not None else set()
    return found - _of_statistics_alone(sums) if sums.statistics else found


def _of_statistics_alone(sums: RowSums) -> set[Node]:
    """What nothing but statistics of the part depends on."""
    program = sums.flow.program
    assert program.loss is not None
    added: set[Node] = set()
    wanted = [program.returned[program.loss]]
    if (output_node(program.graph), wanted[0]) in sums.statistics:
        wanted = []
    while wanted:
        node = wanted.pop()
        if node not in added:
            added.add(node)
            wanted += [source for source in node.all_input_nodes if (node, source) not in sums.statistics]
    of_both = ancestors(source for _, source in sums.statistics)
    changed = {*sums.shares, *(user for user, _ in (*sums.wholes, *sums.shared))}
    for node in changed & of_both & added:
        raise InvariantError(
            f"{described(node)} is part of a statistic of a microbatch and of a sum over the batch; it cannot be both\n"
            "Way out: compute it twice, once for each."
        )
    return of_both - added


def _row_sums(program: Program, many: int, rows: int) -> RowSums:
    """Those of ``program``, a batch of ``many`` rows, in parts as large as a microbatch, of ``rows``.

    In larger parts a model may take rows in pairs (``x[::2] - x[1::2]``). What is a microbatch itself has smaller ones.
    """
    ways = many // rows if many > rows else next(ways for ways in range(2, rows + 1) if rows % ways == 0)
    own = replace(
        program.clone(),
        mesh=Mesh(dp=ways),
        plan=replace(program.plan, zero=0, on_unknown="replicate", outputs="sharded"),
    )
    for node in own.graph.nodes:  # it has the statistics of its rows, if they may be
        if "batch_norm" in str(node.target):
            for user in [user for user in node.users if user.args[1:] == (0,)]:
                user.replace_all_uses_with(node.args[0])
    return row_sums(own, AXIS)


def _joins(sums: RowSums) -> Iterator[tuple[int, str]]:
    program = sums.flow.program
    for place, (node, entry) in enumerate(zip(program.returned, program.outputs)):
        if entry.kind is OutputKind.USER:
            rows = sums.of(node)
            dim = None if rows.dim is None else str(rows.dim)
            yield place, {Kind.SUM: SUM, Kind.SAME: SAME}.get(rows.kind, dim or MIXED)


# ---------------------------------------------------------------- numbers


def _of(of_rows: Callable[[int], Program] | None, rows: int) -> Program:
    if of_rows is None:
        raise InvariantError(
            "what a microbatch counts for in the loss is only told by a trace of the model with another number of rows"
            "\nWay out: compile the model (autopar.compiler.compile_program), not a program of it."
        )
    return of_rows(rows)


def _depends_on_numbers(sums: RowSums) -> bool:
    """Whether the loss is scaled by a number, or is a sum that nothing divides: the number may be that of the rows."""
    cone = _loss_cone(sums)
    scaled = any(_is_scaled_sum(sums, node) for node in cone)
    return scaled or not (sums.shares or any(user in cone for user, _ in sums.wholes))


def _is_scaled_sum(sums: RowSums, node: Node) -> bool:
    return node.target in SCALING and sums.of(node).kind is Kind.SUM and bool(_numbers(node))


def _numbers(node: Node) -> list[float]:
    given = (*node.args, *node.kwargs.values())
    return [number for number in given if isinstance(number, (int, float)) and not isinstance(number, bool)]


def _proportional(
    one: tuple[Program, int], two: tuple[Program, int], twins: Mapping[str, str], sums: RowSums
) -> list[str]:
    """The sums that a number in proportion to the rows of the batch divides: by their names in the second program.

    Of two programs with their rows; ``sums`` are those of the second, whose nodes have ``twins`` in the first. Raises
    InvariantError for a number that depends on the rows otherwise.
    """
    (first, rows), (second, others) = one, two
    mine = {node.name: node for node in first.graph.nodes}
    cone = {node.name: node for node in _loss_cone(sums)}
    found: list[str] = []
    for theirs in second.graph.nodes:
        node = cone.get(theirs.name)
        if node is None or theirs.op != "call_function":
            continue
        twin = mine[twins[theirs.name]]
        is_written = twin.target == theirs.target  # else it is x / 1, of one row, which is x
        now = list(numbers_of(second, theirs))
        numbers = list(numbers_of(first, twin)) if is_written else [1.0] * len(now)
        if len(numbers) == len(now) and not any(map(is_moved, numbers, now)):
            continue
        proportional = all(is_in_proportion(a, rows, b, others) for a, b in zip(numbers, now))
        alone = is_written or list(theirs.all_input_nodes[0].users) == [theirs]
        if sums.of(node).kind is not Kind.SUM or theirs.target not in DIVIDING or not proportional or not alone:
            raise InvariantError(
                f"{described(theirs)} computes with {shown(numbers)} for {rows} rows and with {shown(now)} for "
                f"{others}: a number that depends on the batch, so that a microbatch is not a part of it\n{WAY_OUT}"
            )
        found.append(theirs.name)
    return found


def _twins(one: tuple[Program, int], two: tuple[Program, int]) -> dict[str, str]:
    """The name of each node of the second program -> of its twin in the first.

    With one row, views that change nothing and ``x / 1`` are not written; their twin is that of ``x``. Raises
    InvariantError for programs that differ in more than numbers.
    """
    (first, rows), (second, others) = one, two
    constants = constant_names(first), constant_names(second)  # as many as there are different ones; twins by their use
    waiting = (node for node in first.graph.nodes if node.name not in constants[0])
    mine = next(waiting, None)
    twins: dict[Node, Node] = {}
    for theirs in second.graph.nodes:
        if theirs.name in constants[1]:
            continue
        for source, twin in zip(operands_of(theirs), operands_of(mine) if mine is not None else ()):
            if source.name in constants[1] and twin.name in constants[0]:
                twins.setdefault(source, twin)
        operands = [twins[source] for source in theirs.all_input_nodes if source in twins]
        if mine is not None and mine.target == theirs.target and _are_twins(theirs, mine, twins, constants):
            twins[theirs] = mine
            mine = next(waiting, None)
        elif rows == 1 and len(operands) == 1 and (is_view(theirs.target) or theirs.target in SCALING):
            twins[theirs] = operands[0]
        else:
            raise InvariantError(
                f"the model computes otherwise for a batch of {others} rows than for one of {rows}, so that what a "
                f"microbatch counts for in the loss is not known: {described(theirs)}\nWay out: Plan(microbatches=1)."
            )
    return {theirs.name: twin.name for theirs, twin in twins.items()}


def _are_twins(
    theirs: Node, mine: Node, twins: Mapping[Node, Node], constants: tuple[Mapping[str, str], Mapping[str, str]]
) -> bool:
    """Whether the operands of two nodes are twins, or both constants."""
    pairs = list(zip(operands_of(theirs), operands_of(mine)))
    is_whole = len(operands_of(theirs)) == len(operands_of(mine)) == len(pairs)
    return is_whole and all(
        own.name in constants[0] if source.name in constants[1] else twins[source] is own for source, own in pairs
    )


# ---------------------------------------------------------------- refusing

WAY_OUT = (
    'Way out: Plan(microbatch_weights="statistics"): such a term of the loss is that of each microbatch; '
    'Plan(microbatch_weights="rows"): the mean of the losses of the microbatches, each over its own rows; '
    "Plan(microbatches=1); or a loss that is made of sums and means over rows."
)


def _refusal(program: Program, loss: Rows) -> str:
    where = described(loss.mixed_at) if loss.mixed_at is not None else "the loss"
    return (
        f"the loss is not made of sums and means over the rows of the batch: {where} is computed of all rows at once, "
        f"and of the rows of each of {program.plan.microbatches} microbatches it is another value\n{WAY_OUT}"
    )


def described(node: Node) -> str:
    """A node by its operator and the line of the model."""
    return f"{node.target} at {origin(node).source or origin(node).module or node.name}"
