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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, values
from autopar.ir.operator_facts import is_overload
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.proof.alike import aligned
from autopar.proof.refusal import Layer, Refusal

NUMBERS = ("number", "Optional[number]", "float", "Optional[float]", "Tensor")  # of a schema: no sizes, no dims
CLOSE = 1e-9
STEPS = 6  # from a number among positions to what is looked up by them
LOCAL, AXES = "dims of a rank", "axes"
LOOKED_UP = "looked up by "
SPLIT = ""  # the graph that collectives were put into, before it was differentiated
Form = Callable[[int], float]
FORMS: tuple[Form, ...] = (  # how numbers depend on a product of sizes: counts, means, variances
    lambda n: n, lambda n: 1 / n, lambda n: n - 1, lambda n: 1 / (n - 1), lambda n: n / (n - 1),
    lambda n: 2 / n, lambda n: 2 / (n - 1), lambda n: 1 / math.sqrt(n),
)  # fmt: skip
PARTS = FORMS[1], FORMS[3]  # of a number of the model's own
_COUNTED = re.compile(r"\d+")  # of a block, in the path of a module
Key = tuple[str, str, str, str]  # graph, operator, argument, module without the number of its block
Alone = tuple[str, str, str]  # of a number that one rank has, in whichever graph
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


def compare_numbers(
    large: AnyProgram, small: AnyProgram, single: AnyProgram, more_rows: Callable[[], AnyProgram] | None = None
) -> Compared:
    """Refuse numbers of ``large`` that are neither those of ``small``, nor the model's, nor follow from sizes.

    ``single``: the program of the small model on one rank, whose numbers do not depend on the mesh.
    ``more_rows``: gives that on its mesh for a batch of more rows, which tells rows from ranks where both are 2.
    """
    found = Compared()
    means = _Means([large, small, *([more_rows()] if more_rows is not None else [])], _alone(single))
    wanted, lines = _by_key(small), _lines(large, small)
    at_lines = {(one.node, one.argument): one for one in _numbers(small)}
    meant = set[tuple[Key, float]]()
    for key, numbers in _by_key(large).items():
        found.count += len(numbers)
        for number in numbers:
            line = at_lines.get((lines.get(number.node, number.node), number.argument))
            candidates = [line] if line is not None and line.key == key else wanted.get(key, [])
            right = [one for one in candidates if means.follows(number, one)]
            meant |= {(one.key, one.value) for one in right}
            if not right:
                found.refusals.append(_refused(number, _problem(number, candidates)))
    found.refusals += [] if found.refusals else _lost_scales(large, small)
    for one in [one for numbers in wanted.values() for one in numbers if (one.key, one.value) not in meant]:
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


def _graphs(program: AnyProgram) -> Iterator[tuple[int, str, fx.Graph, Mesh]]:
    """The split graph, and of each stage those that run: (stage, name, graph, mesh)."""
    yield 0, SPLIT, program.graph, program.mesh
    for stage, part in enumerate(program.parts):
        for name, graph in part.required_role.graphs.items():
            yield stage, name, graph, part.mesh


def _numbers(program: AnyProgram) -> Iterator[Number]:
    for _, name, graph, mesh in _graphs(program):
        yield from _of_graph(graph, mesh, name)


def _lines(large: AnyProgram, small: AnyProgram) -> dict[fx.Node, fx.Node]:
    """The nodes of the small program that those of the large one are; none of stages between the first and the last."""
    last = len(large.parts) - 1, len(small.parts) - 1
    there = {(stage, name): graph for stage, name, graph, _ in _graphs(small)}
    found: dict[fx.Node, fx.Node] = {}
    for stage, name, graph, _ in _graphs(large):
        at = 0 if stage == 0 else last[1] if stage == last[0] else -1
        if (at, name) in there:
            found |= aligned(graph, there[at, name])
    return found


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


def _copied(programs: Sequence[AnyProgram]) -> dict[str, set[tuple[float, ...]]]:
    """By module, the values that each number of the traced model has in all programs; {} where their lines differ."""
    sources = [program.source for program in programs]
    graphs = [source.graph for source in sources if source is not None]
    if len(graphs) < len(programs):
        return {}
    lines = [aligned(graphs[0], graph) for graph in graphs[1:]]
    every = [{(one.node, one.argument): one for one in _of_graph(graph, programs[0].mesh, SPLIT)} for graph in graphs]
    found: dict[str, set[tuple[float, ...]]] = {}
    for (node, argument), one in every[0].items():
        others = [known.get((line[node], argument)) if node in line else None for known, line in zip(every[1:], lines)]
        if None in others:
            return {}
        found.setdefault(one.key[3], set()).add((one.value, *(other.value for other in others if other is not None)))
    return found


def _scales(program: AnyProgram) -> dict[tuple[str, float], Number]:
    """What scales pending sums in the split graph, by its module and the factor."""
    found = (one for one in _of_graph(program.graph, program.mesh, SPLIT) if one.is_pending)
    return {(one.key[3], factor): one for one in found if (factor := one.factor) is not None}


# ---------------------------------------------------------------- why a number is right


class _Means:
    """Why a number of the large program is right: by what it, its line in the small one, and that for more rows are.

    ``programs``: these. ``alone``: the numbers that one rank has.
    """

    def __init__(self, programs: Sequence[AnyProgram], alone: set[tuple[Alone, float]]) -> None:
        self.alone = alone
        self.scales = [_scales(program) for program in programs]  # what scales pending sums
        self.own = [_of_model(program) for program in programs]
        self.copied = _copied(programs)
        self.more: dict[tuple[fx.Node, str], Number] = {}
        for (*_, few, _), (_, name, many, mesh) in zip(*map(_graphs, programs[1:])) if len(programs) > 2 else ():
            by_name = {(one.node.name, one.argument): one for one in _of_graph(many, mesh, name)}
            for node in few.nodes:
                self.more |= {(node, argument): one for (known, argument), one in by_name.items() if known == node.name}

    def follows(self, number: Number, small: Number) -> bool:
        """Whether a number of the large program is at its line what ``small`` is at the line of the small one."""
        more = self.more.get((small.node, small.argument))
        every = [number, small] if more is None else [number, small, more]
        own = [(one.key[3], one.value) in known for one, known in zip(every, self.own)]
        if all(own) and self._is_copied(every):
            return True
        scales = [known.get((one.key[3], one.factor or 0.0)) for one, known in zip(every, self.scales)]
        if number.key[0] != SPLIT and scales[1] is not None and (more is None or scales[2] is not None):
            return all(scales) and _is_product([scale for scale in scales if scale is not None])
        if number.is_pending and not own[0]:
            return _is_product(every)
        whole = (small.key[1:], small.value) in self.alone
        is_equal = len({one.value for one in every}) == 1 and (own[0] or not own[1])
        if is_equal and (whole or not small.is_size):
            return True
        return _is_product(every, whole) or (not own[1] and self._is_share(every, whole))

    def _is_copied(self, every: Sequence[Number]) -> bool:
        """Whether one number of the traced model has these values, or it cannot be said which one they are."""
        values_here = tuple(one.value for one in every)
        module = every[0].key[3]
        return any(known[: len(values_here)] == values_here for known in self.copied.get(module, ())) or not self.copied

    def _is_share(self, every: Sequence[Number], whole: bool) -> bool:
        """Whether a number is a part of one of the model's own: ``0.1 / vocabulary`` of smoothed labels."""
        module = every[0].key[3]
        own = {
            value
            for where, value in set.intersection(*self.own)
            if where == module and abs(value) not in (0, 1, math.inf)
        }
        return any(_is_product(every, whole, times, PARTS) for times in own)


def _alone(single: AnyProgram) -> set[tuple[Alone, float]]:
    return {(one.key[1:], one.value) for one in _numbers(single)}


def _is_product(
    numbers: Sequence[Number], whole: bool = False, times: float = 1.0, forms: Sequence[Form] = FORMS
) -> bool:
    """Whether one product of sizes gives all numbers, in one of the forms, ``times`` a number of the model.

    ``whole``: of whole dims.
    """
    values_here = [one.value / times for one in numbers]
    if not all(values_here) or len({value > 0 for value in values_here}) > 1:
        return len(set(values_here)) == 1
    first, *rest = (one.sizes for one in numbers)
    every = {
        (size, *(sizes[name] for sizes in rest))
        for name, size in first.items()
        if all(name in sizes for sizes in rest) and not (whole and (f" {LOCAL} " in name or f" {AXES} " in name))
    }
    goals = [abs(value) for value in values_here]
    for follows in forms:
        for sizes in every:
            if min(sizes) > 1 and all(math.isclose(follows(n), goal, rel_tol=CLOSE) for n, goal in zip(sizes, goals)):
                return True
    return set(goals) == {1.0}
