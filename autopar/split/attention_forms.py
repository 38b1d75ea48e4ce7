"""The form in which each attention runs on parts of the sequence: what each form sends, and which is the cheapest.

    ring      keys and values pass by all ranks, most of it beside the computation; memory of S / n (Liu et al. 2023)
    gather    keys and values are gathered before use, unrepeated heads; memory of S for them
    ulysses   parts of the sequence become parts of the heads and back: four all-to-alls (Jacobs et al. 2023)
    hybrid    all-to-alls among neighbours, a ring over the groups of neighbours (Fang and Zhao 2024)

All ranks must choose alike, so the choice depends on nothing but the call and the mesh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import fx

from autopar.cost.machine import ACCELERATOR, Machine
from autopar.errors import SequenceError
from autopar.ir.node import origin, value
from autopar.ir.program import Program
from autopar.ir.tables import Decision
from autopar.operators import ATTENTIONS
from autopar.rules import call_of
from autopar.rules.factoring import Call
from autopar.split.attention_call import AttentionCall, Work
from autopar.split.flow import Flow

Kind = Literal["ring", "gather", "ulysses", "hybrid"]
Prices = Iterator[tuple[Kind, float | str]]
KINDS: tuple[Kind, ...] = ("ring", "gather", "ulysses", "hybrid")
BALANCED = 1.05  # the largest work of a rank over the mean, up to which parts in plain order will do
LARGEST_GATHERED = 64 * 2**20  # bytes of whole keys and values for which "auto" may gather them


@dataclass(frozen=True)
class Form:
    """``heads``: the neighbours among which a hybrid deals the heads out. ``steps``: of the ring, see :class:`Work`.

    ``prices``: of each form in seconds a step, or why it is not possible.
    """

    kind: Kind
    heads: int = 1
    steps: tuple[int, ...] = ()
    prices: tuple[tuple[str, float | str], ...] = ()


@dataclass(frozen=True)
class Size:
    """What the choice depends on: heads and lengths of one attention on one rank of the axes before, bytes, mask."""

    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int  # of a query and a key
    value_width: int
    batch: int
    itemsize: int
    where: str
    has_bias: bool

    @property
    def key_bytes(self) -> int:
        """Of whole keys and values."""
        return self.batch * self.key_heads * self.keys * (self.width + self.value_width) * self.itemsize

    @property
    def query_bytes(self) -> int:
        """Of whole queries and results."""
        return self.batch * self.heads * self.queries * (self.width + self.value_width) * self.itemsize


def size_of(call: Call) -> Size:
    query, key, held = call.inputs[:3]
    attention = AttentionCall.of(call)
    return Size(
        heads=query[-3] if len(query) > 2 else 1,
        key_heads=key[-3] if len(key) > 2 else 1,
        queries=query[-2],
        keys=key[-2],
        width=query[-1],
        value_width=held[-1],
        batch=math.prod(query[:-3]),
        itemsize=value(call.operands[0]).dtype.itemsize,
        where=attention.where,
        has_bias=attention.bias is not None,
    )


ZIG_ZAG = "zig-zag order"


@lru_cache(maxsize=256)
def choose_form(
    size: Size, ways: int, tensor_ways: int, mirrored: bool, asked: str, machine: Machine = ACCELERATOR
) -> Form:
    """The form ``asked`` for, or with ``"auto"`` the cheapest one.

    ``tensor_ways``: by how many ranks another axis will split the heads. A form that is asked for and not possible has
    its reason among the prices; no other is taken in its place: see :meth:`Forms.check`.
    """
    work = Work.of(size.where, ways, mirrored, size.queries, size.keys)
    prices = dict(_prices(size, ways, tensor_ways, work, machine))
    heads = hybrid_heads(size, ways, tensor_ways)
    if asked == "auto":
        possible = {kind: price for kind, price in prices.items() if isinstance(price, float)}
        if size.key_bytes > LARGEST_GATHERED and len(possible) > 1:
            possible.pop("gather")
        asked = min(possible, key=lambda kind: (possible[kind], KINDS.index(kind)))
    ring_ways = ways // heads if asked == "hybrid" else ways
    steps = Work.of(size.where, ring_ways, mirrored, size.queries, size.keys).steps
    return Form(asked, heads, steps, tuple(prices.items()))  # type: ignore[arg-type]


def hybrid_heads(size: Size, ways: int, tensor_ways: int) -> int:
    """The most neighbours, fewer than all, to whom the heads of keys can be dealt out; 1 where there are none."""
    own = size.key_heads // tensor_ways if size.key_heads % tensor_ways == 0 else size.key_heads
    return max((n for n in range(1, ways) if ways % n == 0 and own % n == 0), default=1)


def _prices(size: Size, ways: int, tensor_ways: int, work: Work, machine: Machine) -> Prices:
    yield "ring", _ring(size, ways, work, machine)
    yield "gather", _gather(size, ways, work, machine)
    heads, both = size.heads, ways * tensor_ways
    if heads % both:
        split = f"{ways} ranks" if tensor_ways == 1 else f"{ways} x {tensor_ways} ranks"
        yield "ulysses", f"{heads} heads do not divide by {split}"
    else:
        yield "ulysses", _ulysses(size, ways, work, machine)
    inner = hybrid_heads(size, ways, tensor_ways)
    if inner == 1:
        yield "hybrid", f"no group of neighbours, smaller than {ways} ranks, divides {size.key_heads} heads of keys"
    elif size.has_bias:
        yield "hybrid", "its mask is a tensor, of which each rank has its rows only"
    else:
        yield "hybrid", _hybrid(size, ways, inner, work, machine)


def _compute(size: Size, ways: int, work: Work, machine: Machine) -> float:
    """Seconds of the mean rank, forward and backward (twice as long): two products of matrices."""
    pairs = size.batch * size.heads * work.total / ways
    return 6.0 * pairs * (size.width + size.value_width) / machine.flops


def _ring(size: Size, ways: int, work: Work, machine: Machine) -> float:
    compute = _compute(size, ways, work, machine)
    count, own = len(work.steps), size.key_bytes / ways
    sent = (3 * count + 1) * own / machine.link if count else 0.0
    started = (6 * count + 2) * machine.latency if count else 0.0
    beside = compute * count / (count + 1)
    return started + max(0.0, sent - beside) + compute * (work.imbalance - 1)


def _gather(size: Size, ways: int, work: Work, machine: Machine) -> float:
    sent = 2 * (ways - 1) * size.key_bytes / ways / machine.link
    return 4 * machine.latency + sent + _compute(size, ways, work, machine) * (work.imbalance - 1)


def _ulysses(size: Size, ways: int, work: Work, machine: Machine) -> float:
    repeated = math.lcm(size.key_heads, ways) / size.key_heads
    moved = (size.query_bytes + repeated * size.key_bytes) / ways
    return 8 * machine.latency + 2 * moved * (ways - 1) / ways / machine.link


def _hybrid(size: Size, ways: int, inner: int, work: Work, machine: Machine) -> float:
    moved = (size.query_bytes + size.key_bytes) / ways
    exchanged = 8 * machine.latency + 2 * moved * (inner - 1) / inner / machine.link
    outer = ways // inner
    count = max(0, min(len(work.steps), outer - 1))
    compute = _compute(size, ways, work, machine)
    sent = (3 * count + 1) * size.key_bytes / ways / machine.link
    return exchanged + (6 * count + 2) * machine.latency + max(0.0, sent - compute * count / (count + 1))


@dataclass(frozen=True)
class Forms:
    """The forms of all attentions of a program on one axis."""

    program: Program
    axis: str
    mirrored: bool

    def form(self, call: Call) -> Form:
        """The form of one attention call, the same on all ranks."""
        mesh, asked = self.program.mesh, self.program.plan.attention
        pinned = self._pinned(call)
        if asked == "auto" and pinned:
            asked = pinned.split()[0]
        return choose_form(size_of(call), mesh.size(self.axis), mesh.size("tp"), self.mirrored, asked)

    def _pinned(self, call: Call) -> str:
        """What another program decided for this attention, see :class:`autopar.ir.tables.Pins`; empty for nothing.

        Its decisions have the names of the operators that an attention became: the order tells which is which.
        """
        choices = self.program.pins.choices.get(self.axis)
        if not choices:
            return ""
        chosen = [choice for choice in choices.values() if choice.split()[1:2] in (["attention"], ["attention,"])]
        here = attentions(self.program)
        places = [n for n, node in enumerate(here) if node.all_input_nodes[:3] == list(call.operands[:3])]
        return chosen[places[0]] if len(chosen) == len(here) and places else ""

    def decisions(self, flow: Flow) -> dict[str, Decision]:
        """The form of each attention, with the price of the others."""
        return {
            node.name: _decision(self.form(call), self.mirrored)
            for node, call in flow.calls.items()
            if node.target in ATTENTIONS
        }

    def is_uneven_in_order(self, node: fx.Node) -> bool:
        """Whether the ranks would have unequal work if each had one contiguous part."""
        call = call_of(node, self.program.mesh)
        size, ways = size_of(call), self.program.mesh.size(self.axis)
        pinned = self._pinned(call)
        if pinned:
            return ZIG_ZAG in pinned
        work = Work.of(size.where, ways, False, size.queries, size.keys)
        return self.form(call).kind != "ulysses" and work.imbalance > BALANCED

    def check(self, node: fx.Node) -> None:
        """Raise SequenceError where this attention cannot run in the form that the plan asks for."""
        form = self.form(call_of(node, self.program.mesh))
        reason = dict(form.prices)[form.kind]
        if isinstance(reason, str):
            asked, where = self.program.plan.attention, origin(node).module or node.name
            ways = self.program.mesh.size(self.axis)
            raise SequenceError(
                f'Plan(attention="{asked}") is not possible at {where} on {self.axis}={ways}: {reason}\n'
                'Way out: Plan(attention="ring") or "gather", which any attention can do, or "auto", which chooses.'
            )


def _decision(form: Form, mirrored: bool) -> Decision:
    prices = dict(form.prices)
    least = prices[form.kind]
    assert isinstance(least, float), form
    others = {
        f"{kind} attention": price if isinstance(price, str) else price - least
        for kind, price in prices.items()
        if kind != form.kind
    }
    order = f", {ZIG_ZAG}" if mirrored and form.kind != "ulysses" else ""
    group = f", heads over {form.heads} neighbours" if form.kind == "hybrid" else ""
    return Decision(f"{form.kind} attention{group}{order}", others)


def attentions(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target in ATTENTIONS]
