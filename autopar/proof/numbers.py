"""The numbers in the programs of a large model against those of the reduced one, which was executed.

    div(mean{sum:dp}, 2)      on dp=2        a pending sum over dp, divided by its ranks
    div(mean{sum:dp}, 128)    on dp=128      the same
    div(mean{sum:dp}, 1024)   on dp=128      refused: no product of sizes is 2 there and 1024 here

A number that an operator is given (a factor, an epsilon, what is added to a position) has to be that of the small
program at such a line, or that of the model itself at that place in both, or the same product of the sizes that meet at
the line in both. What scales a pending sum has to be such a product, without any other factor; and what goes backward
through a scale is scaled alike.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, values
from autopar.ir.operator_facts import is_overload
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.proof.refusal import Layer, Refusal

NUMBERS = ("number", "Optional[number]", "float", "Optional[float]")  # of a schema, that are no sizes or dims
CLOSE = 1e-9
MOST_FACTORS = 3  # of a product of sizes
SPLIT = ""  # the graph that collectives were put into, before it was differentiated
_COUNTED = re.compile(r"\d+")  # of a block, in the path of a module
Key = tuple[str, str, str, str]  # graph, operator, argument, module without the number of its block
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Number:
    """One number among the arguments of a node."""

    value: float
    node: Node
    argument: str
    key: Key
    mesh: Mesh

    @property
    def factor(self) -> float | None:
        """By what the node scales its operand; None where it does something else."""
        operator = self.key[1]
        if operator.startswith("aten.mul."):
            return self.value
        return 1 / self.value if operator.startswith("aten.div.") and self.value else None

    @property
    def is_pending(self) -> bool:
        """Whether it scales a sum that is still to be completed over ranks."""
        kinds = [kind for source in (self.node, *self.node.all_input_nodes) for kind in values(source)]
        return self.factor is not None and any(op == "sum" for kind in kinds for _, op in kind.layout.partial)

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes that meet here: of dims, whole and local, of operands and theirs, and of axes in their layouts."""
        found: dict[str, int] = {}
        for words, node in _near(self.node):
            for number, kind in enumerate(values(node)):
                local = kind.layout.local_shape(self.mesh)
                for dim, (size, part) in enumerate(zip(kind.shape, local)):
                    found[f"{words} {number} dim {dim}"], found[f"{words} {number} local dim {dim}"] = size, part
                groups = [*kind.layout.groups, *(axis for axis, _ in kind.layout.partial)]
                found |= {f"axis {axis}": self.mesh.size(axis) for axis in groups}
        return found


def _near(node: Node) -> Iterator[tuple[str, Node]]:
    yield "result", node
    for place, operand in enumerate(node.all_input_nodes):
        yield f"operand {place}", operand
        for other, before in enumerate(operand.all_input_nodes):
            yield f"operand {place}.{other}", before


@dataclass
class Compared:
    """``count``: the numbers of the large program that were looked at."""

    count: int = 0
    refusals: list[Refusal] = field(default_factory=list)


def compare_numbers(large: AnyProgram, small: AnyProgram) -> Compared:
    """Refuse numbers of ``large`` that are neither those of ``small``, nor the model's, nor follow from sizes."""
    found = Compared()
    known: dict[tuple[Key, float, int], str] = {}
    wanted, scales = _by_key(small), [_scales(large), _scales(small)]
    own = [_of_model(large), _of_model(small)]
    for number in _numbers(large):
        found.count += 1
        place = number.key, number.value, hash(tuple(number.sizes.items()))
        if place not in known:
            candidates = wanted.get(number.key, [])
            right = any(_follows(number, one, scales, own) for one in candidates)
            known[place] = "" if right else _problem(number, candidates)
            if not right:
                module = origin(number.node).module
                where = f"{number.key[0] or 'the split graph'}: {number.node.name}{f' ({module})' if module else ''}"
                cause = "a scale that is not that of this mesh, or a number of another place"
                found.refusals.append(Refusal(Layer.RELATIONS, where, known[place], cause))
    return found


def _problem(number: Number, candidates: list[Number]) -> str:
    values_there = sorted({one.value for one in candidates})
    words = f"{number.key[1]} is given {number.value:g} as {number.argument}"
    if not values_there:
        return f"{words}, and the reduced program has no such line there"
    there = ", ".join(f"{value:g}" for value in values_there[:4])
    return f"{words}, the reduced program {there}: no product of the sizes that meet there gives both"


# ---------------------------------------------------------------- what is compared


def _numbers(program: AnyProgram) -> Iterator[Number]:
    yield from _of_graph(program.graph, program.mesh, SPLIT)
    for part in program.parts:
        for name, graph in part.required_role.graphs.items():
            yield from _of_graph(graph, part.mesh, name)


def _of_graph(graph: fx.Graph, mesh: Mesh, name: str) -> Iterator[Number]:
    for node in graph.nodes:
        if node.op != "call_function" or node.target in comm.TARGETS:
            continue
        operator = str(node.target) if is_overload(node.target) else getattr(node.target, "__name__", "")
        for argument, given in _given(node):
            key = name, operator, argument, _COUNTED.sub("#", origin(node).module)
            yield Number(float(given), node, argument, key, mesh)


def _given(node: Node) -> Iterator[tuple[str, float]]:
    """The arguments of a node that are numbers: no sizes, dims, or choices."""
    if not is_overload(node.target):
        places = {**{str(place): given for place, given in enumerate(node.args)}, **node.kwargs}
        yield from ((name, given) for name, given in places.items() if isinstance(given, float))
        return
    for place, argument in enumerate(node.target._schema.arguments):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        if str(argument.type) in NUMBERS and isinstance(given, int | float) and not isinstance(given, bool):
            yield argument.name, given


def _by_key(program: AnyProgram) -> dict[Key, list[Number]]:
    found: dict[Key, list[Number]] = {}
    for number in _numbers(program):
        same = found.setdefault(number.key, [])
        if not any(one.value == number.value and one.sizes == number.sizes for one in same):
            same.append(number)
    return found


def _of_model(program: AnyProgram) -> set[tuple[str, float]]:
    """The numbers of the traced model, by the modules that they stand in."""
    if program.source is None:
        return set()
    return {(one.key[3], one.value) for one in _of_graph(program.source.graph, program.mesh, SPLIT)}


def _scales(program: AnyProgram) -> dict[tuple[str, float], Number]:
    """What scales pending sums in the split graph, by its module and the factor."""
    found = (one for one in _of_graph(program.graph, program.mesh, SPLIT) if one.is_pending)
    return {(one.key[3], factor): one for one in found if (factor := one.factor) is not None}


# ---------------------------------------------------------------- why a number is right


def _follows(number: Number, small: Number, scales: list[dict[tuple[str, float], Number]], own: list[set[Any]]) -> bool:
    """Whether a number of the large program is at its line what ``small`` is at the line of the small one."""
    here, there = ((one.key[3], one.value) for one in (number, small))
    if number.key[0] != SPLIT and small.factor is not None:
        scale = scales[1].get((small.key[3], small.factor))
        if scale is not None:
            assert number.factor is not None
            other = scales[0].get((number.key[3], number.factor))
            return other is not None and _is_product(other, scale, alone=True)
    if number.is_pending and here not in own[0]:
        return _is_product(number, small, alone=True)
    if math.isclose(number.value, small.value, rel_tol=CLOSE) or (here in own[0] and there in own[1]):
        return True
    return _is_product(number, small, alone=False)


def _is_product(large: Number, small: Number, alone: bool) -> bool:
    """Whether one product of sizes, or of their inverses, gives both numbers; else only how they grow."""
    if not large.value or not small.value or large.value * small.value < 0:
        return large.value == small.value
    names = [name for name in large.sizes if name in small.sizes]
    pairs = {(large.sizes[name], small.sizes[name]) for name in names}
    pairs = {pair for pair in pairs if pair[0] > 1 or pair[1] > 1}
    logs = [(math.log(one), math.log(other)) for one, other in pairs if 0 not in (one, other)]
    goals = math.log(abs(large.value)), math.log(abs(small.value))
    if not alone:
        grown = {round(one - other, 9) for one, other in logs} - {0.0}
        logs, goals = [(each, 0.0) for each in grown], (goals[0] - goals[1], 0.0)
    signed = [(sign * one, sign * other) for one, other in logs for sign in (1, -1)]
    for count in range(MOST_FACTORS + 1):
        for chosen in itertools.combinations_with_replacement(signed, count):
            sums = [sum(pair[place] for pair in chosen) for place in (0, 1)]
            if all(math.isclose(one, goal, abs_tol=CLOSE) for one, goal in zip(sums, goals)):
                return True
    return False
