"""The numbers in the programs of a large model against those of the reduced one, which was executed.

    div(mean{sum:dp}, 2)      on dp=2        a pending sum over dp, divided by its ranks
    div(mean{sum:dp}, 128)    on dp=128      the same
    div(mean{sum:dp}, 1024)   on dp=128      refused: no product of sizes is 2 there and 1024 here

A number that an operator is given (a factor, an epsilon, what is added to a position) has to be that of the small
program at such a line, or that of the model itself at that place in both, or the same product of the sizes that meet at
the line in both: those of whole dims where one rank alone has the number too, else any. What scales a pending sum has
to be such a product, and it has to be in the graphs that run as it is in the split one.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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

NUMBERS = ("number", "Optional[number]", "float", "Optional[float]", "Tensor")  # of a schema: no sizes, no dims
CLOSE = 1e-9
STEPS = 6  # from a number among positions to what is looked up by them
LOCAL, AXES = "dims of a rank", "axes"
LOOKED_UP = "looked up by "
SPLIT = ""  # the graph that collectives were put into, before it was differentiated
FORMS: tuple[Callable[[int], float], ...] = (  # how numbers depend on a product of sizes: counts, means, variances
    lambda n: n, lambda n: 1 / n, lambda n: n - 1, lambda n: 1 / (n - 1), lambda n: n / (n - 1),
    lambda n: 2 / n, lambda n: 2 / (n - 1), lambda n: 1 / math.sqrt(n),
)  # fmt: skip
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
    parameters: Mapping[str, Node]  # those that nodes of its module take, by their names without the number of a block

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
        """The sizes that meet here, by words: of some dims of one value, whole or on a rank, and of its axes.

        The values are the result, its operands and theirs, and what the module holds.
        """
        found: dict[str, int] = {}
        for words, node in (*_near(self.node), *self.parameters.items()):
            for number, kind in enumerate(values(node)):
                axes = {**dict.fromkeys(kind.layout.groups), **{axis: None for axis, _ in kind.layout.partial}}
                local = kind.layout.local_shape(self.mesh)
                for name, sizes in (
                    ("dims", kind.shape), (LOCAL, local), (AXES, [self.mesh.size(axis) for axis in axes]),
                ):  # fmt: skip
                    for count in range(1, len(sizes) + 1):
                        for some in itertools.combinations(range(len(sizes)), count):
                            found[f"{words} {number} {name} {some}"] = math.prod(sizes[at] for at in some)
                if words.startswith(LOOKED_UP):  # by positions in all of a dim, of which a rank has a part
                    for axis, (at, size) in itertools.product(self.mesh.names, enumerate(local)):
                        found[f"{words} {number} dims {(at,)} of all {axis}"] = size * self.mesh.size(axis)
        return found

    @cached_property
    def is_size(self) -> bool:
        """Whether some product of sizes gives it."""
        every = {size for size in self.sizes.values() if size > 1}
        return any(math.isclose(follows(size), abs(self.value), rel_tol=CLOSE) for follows in FORMS for size in every)


def _near(node: Node) -> Iterator[tuple[str, Node]]:
    yield "result", node
    for place, operand in enumerate(node.all_input_nodes):
        yield f"operand {place}", operand
        for other, before in enumerate(operand.all_input_nodes):
            yield f"operand {place}.{other}", before
    yield from _counted_in(node)


def _counted_in(node: Node) -> Iterator[tuple[str, Node]]:
    """What is looked up by positions that are computed from ``node``, or from what it compares: embeddings, logits."""
    found = {node: "", **{operand: f"operand {place}" for place, operand in enumerate(node.all_input_nodes)}}
    reached = list(found)
    for one in reached:
        if any(kind.dtype.is_floating_point or kind.dtype.is_complex for kind in values(one)):
            continue
        for user in one.users:
            words = f"{found[one]} > {user.target}"
            if user.op == "call_function" and user not in found and words.count(">") <= STEPS:
                found[user] = words
                reached.append(user)
                operands = enumerate(user.all_input_nodes)
                yield from ((f"{LOOKED_UP}{words} {place}", operand) for place, operand in operands)


@dataclass
class Compared:
    """``count``: the numbers of the large program that were looked at, once for blocks that are equal."""

    count: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)


def compare_numbers(large: AnyProgram, small: AnyProgram, single: AnyProgram) -> Compared:
    """Refuse numbers of ``large`` that are neither those of ``small``, nor the model's, nor follow from sizes.

    ``single``: the program of the small model on one rank, whose numbers do not depend on the mesh.
    """
    found = Compared()
    given, wanted = _by_key(large), _by_key(small)
    means = _Means([_scales(large), _scales(small)], [_of_model(large), _of_model(small)], _alone(single))
    for key, numbers in given.items():
        found.count += len(numbers)
        for number in numbers:
            if not any(means.follows(number, one) for one in wanted.get(key, [])):
                found.refusals.append(_refused(number, _problem(number, wanted.get(key, []))))
    found.refusals += [] if found.refusals else _lost_scales(large, small)
    for key, numbers in wanted.items():
        for one in numbers:
            if not any(means.follows(number, one) for number in given.get(key, [])):
                where = f"{one.key[0] or 'the split graph'}: {one.key[1]} with {one.value:g} of '{one.key[3]}'"
                found.unproved.append(f"the reduced program has {where}, and nothing here is that")
    return found


def _refused(number: Number, problem: str) -> Refusal:
    module = origin(number.node).module
    where = f"{number.key[0] or 'the split graph'}: {number.node.name}{f' ({module})' if module else ''}"
    return Refusal(
        Layer.RELATIONS, where, problem, "a scale that is not that of this mesh, or a number of another place"
    )


def _lost_scales(large: AnyProgram, small: AnyProgram) -> list[Refusal]:
    """Scales of pending sums that fewer lines of a graph that runs have than of the split one, not so in ``small``."""
    (here, first), (there, _) = _counted(large), _counted(small)
    kept = {name for name in here if name != SPLIT and all(n >= there[SPLIT][key] for key, n in _found(there, name))}
    lost = [(name, key) for name in kept for key, n in _found(here, name) if n < here[SPLIT][key]]
    words = "it is in fewer lines of {} than of the split graph: another number stands in one"
    return [_refused(first[key], words.format(name)) for name, key in lost]


def _counted(program: AnyProgram) -> tuple[dict[str, Counter[tuple[str, float]]], dict[tuple[str, float], Number]]:
    """How often each graph scales by a number that the split graph scales pending sums by, in each module."""
    first = {(one.key[3], factor): one for one in _of_graph(program.graph, program.mesh, SPLIT)
             if one.is_pending and (factor := one.factor) is not None}  # fmt: skip
    found: dict[str, Counter[tuple[str, float]]] = {}
    for one in _numbers(program):
        counts = found.setdefault(one.key[0], Counter())
        factor = one.factor
        if factor is not None and (one.key[3], factor) in first and (one.key[0] != SPLIT or one.is_pending):
            counts[one.key[3], factor] += 1
    return found, first


def _found(counts: Mapping[str, Counter[tuple[str, float]]], name: str) -> list[tuple[tuple[str, float], int]]:
    return [(key, counts.get(name, Counter())[key]) for key in counts.get(SPLIT, ())]


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
    held: dict[str, dict[str, Node]] = {}
    for node in graph.nodes:
        own = held.setdefault(origin(node).module, {})
        own |= {_COUNTED.sub("#", one.name): one for one in node.all_input_nodes if one.op == "placeholder"}
    for node in graph.nodes:
        if node.op != "call_function" or node.target in comm.TARGETS:
            continue
        operator = str(node.target) if is_overload(node.target) else getattr(node.target, "__name__", "")
        for argument, given in _given(node):
            key = name, operator, argument, _COUNTED.sub("#", origin(node).module)
            yield Number(float(given), node, argument, key, mesh, held[origin(node).module])


def _given(node: Node) -> Iterator[tuple[str, float]]:
    """The arguments of a node that are numbers: no sizes, dims, or choices."""
    if not is_overload(node.target):
        places = {**{str(place): given for place, given in enumerate(node.args)}, **node.kwargs}
        yield from ((name, given) for name, given in places.items() if isinstance(given, float))
        return
    target: Any = node.target
    for place, argument in enumerate(target._schema.arguments):
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


@dataclass(frozen=True)
class _Means:
    """Of the large and of the small program: what scales pending sums, and the model's own numbers, each by module.

    ``alone``: the numbers that one rank has.
    """

    scales: list[dict[tuple[str, float], Number]]
    own: list[set[tuple[str, float]]]
    alone: set[tuple[Key, float]]

    def follows(self, number: Number, small: Number) -> bool:
        """Whether a number of the large program is at its line what ``small`` is at the line of the small one."""
        here, there = ((one.key[3], one.value) for one in (number, small))
        if number.key[0] != SPLIT and small.factor is not None:
            scale = self.scales[1].get((small.key[3], small.factor))
            if scale is not None:
                other = self.scales[0].get((number.key[3], number.factor or 0.0))
                return other is not None and _is_product(other, scale, whole=False)
        if number.is_pending and here not in self.own[0]:
            return _is_product(number, small, whole=False)
        whole = (small.key, small.value) in self.alone
        if here in self.own[0] and there in self.own[1]:
            return True
        if number.value == small.value and (whole or not small.is_size):
            return True
        return _is_product(number, small, whole)


def _alone(single: AnyProgram) -> set[tuple[Key, float]]:
    return {(one.key, one.value) for one in _numbers(single)}


def _is_product(large: Number, small: Number, whole: bool) -> bool:
    """Whether one product of sizes gives both numbers, in one of the forms. ``whole``: of whole dims."""
    if not large.value or not small.value or large.value * small.value < 0:
        return large.value == small.value
    pairs = {
        (size, small.sizes[name])
        for name, size in large.sizes.items()
        if name in small.sizes and not (whole and (f" {LOCAL} " in name or f" {AXES} " in name))
    }
    goals = abs(large.value), abs(small.value)
    for follows in FORMS:
        for sizes in pairs:
            if min(sizes) > 1 and all(math.isclose(follows(n), goal, rel_tol=CLOSE) for n, goal in zip(sizes, goals)):
                return True
    return goals == (1.0, 1.0)
