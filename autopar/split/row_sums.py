"""What becomes of the rows of a batch: each value of a program is rows, a sum over rows, or the same for all rows.

A batch in parts that run one after the other is split as it would be over ranks, so the rules of the batch axes say
which dim of a value has the rows, and where values of all rows meet:

* what sums over rows is, for a part, a summand of that of the whole batch: ``SUM``;
* a sum that depends on inputs alone (how many labels count) can be computed of the whole batch beforehand: ``wholes``;
* a mean over rows counts for a part in proportion to its rows, and so does what is the same for all rows, where it is
  added to a sum: ``shares``;
* anything else that several rows meet in (a maximum, a product of two sums, scores of rows against rows) is ``MIXED``:
  parts do not tell it. With ``Plan(microbatch_weights="statistics")`` a part has its own, and it counts in proportion
  to its rows where it is added to a sum over rows: ``statistics``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from autopar.ir.evaluate import FILLED
from autopar.ir.layout import Partial, Placement, Split
from autopar.ir.node import Node
from autopar.ir.program import Program
from autopar.ir.reach import made_only_of
from autopar.ir.tables import InputKind
from autopar.operators import random
from autopar.rules.factoring import Strategy
from autopar.rules.positions import PICKS
from autopar.rules.reductions import share_of_mean
from autopar.split.batch_policy import batch_policy
from autopar.split.choose import Choice, choose
from autopar.split.flow import Flow, Key, key_of
from autopar.split.split_axis import spread_flow

aten = torch.ops.aten
PICKED = (*PICKS, aten.index.Tensor)


class Kind(enum.Enum):
    ROWS = "rows"
    SUM = "sum"
    SAME = "same"
    MIXED = "mixed"


@dataclass(frozen=True)
class Rows:
    """The kind of one value.

    ``split``: where it has its rows. ``mixed_at``: the first call that rows meet in.
    """

    kind: Kind
    split: Split | None = None
    mixed_at: Node | None = None

    @property
    def dim(self) -> int | None:
        """The dim that is one block of each part's rows after the other; None where there is none such."""
        plain = self.split is not None and self.split == Split(self.split.dim)
        return self.split.dim if self.split is not None and plain else None


SUM, SAME = Rows(Kind.SUM), Rows(Kind.SAME)


@dataclass
class RowSums:
    """The kinds of all values of a program, and what a part of its batch needs; nodes are those of ``flow.program``.

    Attributes:
        wholes: (user, operand): the user needs the operand, a sum over rows of inputs, of the whole batch.
        shares: calls whose result is a mean over rows: a part counts in proportion to its rows.
        shared: (user, operand): the operand is the same for all rows and is added to a sum over them.
        statistics: those of ``shared`` whose operand is ``MIXED``.
    """

    flow: Flow
    choice: Choice
    found: dict[Key, Rows] = field(default_factory=dict)
    wholes: dict[tuple[Node, Node], None] = field(default_factory=dict)
    shares: dict[Node, None] = field(default_factory=dict)
    shared: dict[tuple[Node, Node], None] = field(default_factory=dict)
    statistics: dict[tuple[Node, Node], None] = field(default_factory=dict)

    def of(self, node: Node) -> Rows:
        return self.found[key_of(node)]

    @cached_property
    def given(self) -> set[Node]:
        """What depends on inputs, buffers and constants alone."""
        kinds = (InputKind.INPUT, InputKind.BUFFER, InputKind.CONSTANT)
        sources = [node for node, _ in self.flow.program.placeholders(*kinds)]
        return made_only_of(self.flow.program.graph, sources, factories=True)


def row_sums(program: Program, axis: str) -> RowSums:
    """The kinds of the values of a program that nothing splits yet, by the rows that ``axis`` would split.

    Raises IndivisibleError where ``axis`` does not divide the batch, UnknownOperatorError.
    """
    policy = batch_policy(program, axis)
    flow = spread_flow(program, policy)
    result = RowSums(flow, choose(flow, policy))
    for node, placement in result.choice.placeholders.items():
        result.found[node, 0] = _rows(placement)
    for call in flow.calls:
        for index, rows in enumerate(_results(result, call)):
            result.found[call, index] = rows
    return result


def _rows(placement: Placement) -> Rows:
    if isinstance(placement, Split):
        return Rows(Kind.ROWS, placement)
    return SUM if isinstance(placement, Partial) else SAME


def _results(result: RowSums, call: Node) -> Sequence[Rows]:
    """The kinds of the results of ``call``, from those of its operands; notes what a part needs."""
    strategy, operands = result.choice.strategies[call], result.flow.calls[call].operands
    kinds = [result.of(operand) for operand in operands]
    mixed = next((rows for rows in kinds if rows.kind is Kind.MIXED), None)
    if mixed is None:
        found = _by_part(result, call, strategy, kinds) if strategy.part else _by_sum(result, call, kinds)
    else:
        found = None if strategy.part else _with_statistics(result, call, kinds)
    if found is not None:
        return found
    mixed = mixed or Rows(Kind.MIXED, mixed_at=call)
    return (mixed,) * len(strategy.outputs)


def _by_part(result: RowSums, call: Node, strategy: Strategy, kinds: Sequence[Rows]) -> Sequence[Rows] | None:
    """The kinds of the results of a call of which each part does its rows; None where rows meet in it."""
    assert strategy.part is not None
    rewrite = result.flow.factorings[call].rewrites.get(strategy.part.factor)
    made = [_rows(placement) for placement in strategy.outputs]
    sums = all(not isinstance(placement, Partial) or placement.op == "sum" for placement in strategy.outputs)
    if not sums or SAME in made or rewrite not in (None, share_of_mean):
        return None
    draws = getattr(call.target, "__module__", "") == random.__name__  # of a position it draws what it draws of others
    wholes, shared = [], []
    for operand, wanted, rows in zip(result.flow.calls[call].operands, strategy.inputs, kinds):
        if rows.kind is Kind.ROWS and _rows(wanted) != rows:
            return None
        if rows.kind is Kind.SUM and not isinstance(wanted, Partial):
            if operand not in result.given or isinstance(wanted, Split):
                return None
            wholes.append((call, operand))
        if rows.kind is Kind.SAME and isinstance(wanted, Partial):
            shared.append((call, operand))
        if (
            rows.kind is Kind.SAME
            and isinstance(wanted, Split)
            and not (draws or _alike(result, call, operand, wanted))
        ):
            return None
    result.wholes |= dict.fromkeys(wholes)
    result.shared |= dict.fromkeys(shared)
    if rewrite is share_of_mean:
        result.shares[call] = None
    return made


def _by_sum(result: RowSums, call: Node, kinds: Sequence[Rows]) -> Sequence[Rows] | None:
    """The kinds of the results of a call that no part does by rows; None where rows meet in it.

    It is linear in the sums among its operands, or these are sums of inputs, which it takes of the whole batch.
    """
    operands, count = result.flow.calls[call].operands, len(result.choice.strategies[call].outputs)
    if any(rows.kind is Kind.ROWS for rows in kinds):
        return None
    sums = {place for place, rows in enumerate(kinds) if rows.kind is Kind.SUM}
    groups = result.flow.factorings[call].linear
    learned = {place for place in sums if operands[place] not in result.given}
    if not learned:
        pure = any(sums == group for group in groups)
        if not pure:
            result.wholes |= dict.fromkeys((call, operands[place]) for place in sums)
        return (SUM if sums and pure else SAME,) * count
    group = next((group for group in groups if learned <= group), None)
    if group is None:
        return None
    result.wholes |= dict.fromkeys((call, operands[place]) for place in sums - group)
    result.shared |= dict.fromkeys((call, operands[place]) for place in group - sums)
    return (SUM,) * count


def _with_statistics(result: RowSums, call: Node, kinds: Sequence[Rows]) -> Sequence[Rows] | None:
    """The kinds of the results of an addition of statistics of each part to a sum over rows."""
    program, operands = result.flow.program, result.flow.calls[call].operands
    mixed = {place for place, rows in enumerate(kinds) if rows.kind is Kind.MIXED}
    learned = {
        place for place, rows in enumerate(kinds) if rows.kind is Kind.SUM and operands[place] not in result.given
    }
    groups = result.flow.factorings[call].linear
    if program.plan.microbatch_weights != "statistics" or not learned:
        return None
    if not any(mixed | learned <= group for group in groups):
        return None
    found = _by_sum(result, call, [SAME if place in mixed else rows for place, rows in enumerate(kinds)])
    if found is not None:
        result.statistics |= dict.fromkeys((call, operands[place]) for place in mixed)
    return found


def _alike(result: RowSums, call: Node, operand: Node, wanted: Split) -> bool:
    """Whether all rows of what is the same for each part are alike, so that it does not matter which a part takes.

    What has a row for each of the batch, and is neither a constant nor filled with one number, tells rows apart by
    their positions (a parameter with a row for each, ``arange``): only a call that picks something in each row may.
    """
    entry = next((entry for entry in result.flow.program.inputs if entry.node == operand.name), None)
    if entry is None:
        picks = call.target in PICKED and any(
            result.of(one).kind is Kind.ROWS for one in result.flow.calls[call].operands
        )
        return picks or operand.target in FILLED
    if entry.kind is not InputKind.CONSTANT:
        return False
    constant = result.flow.program.constants[entry.target]
    if isinstance(constant, FakeTensor):
        return True
    rows: Tensor = constant.unflatten(wanted.dim, (wanted.outer, -1))  # type: ignore[no-untyped-call]
    return bool((rows == rows.narrow(wanted.dim + 1, 0, 1)).all())
