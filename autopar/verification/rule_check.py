"""The check of a rule against its operator: every strategy is run on pieces and compared with the unsplit call.

``check`` builds a program of one node, lets :mod:`autopar.split.split_axis` rewrite it with the strategy forced, runs
it on all ranks in lock-step with autograd through the collectives, and joins outputs and input gradients by their
placements:

    outputs    S: the parts joined,  P: the sum (maximum),  I and R: the same on every rank
    cotangent  S: its slice,         P and I: the whole,    R: summands
    gradient   S: the slices,        P and I: the whole on each rank,  R: summands of the whole

An uneven part is padded with garbage (zeros for parameters): results must not depend on it, and no gradient may come
out of padding, since the operator before would spread it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.errors import WrongRuleError
from autopar.ir.layout import REPLICATED, Layout, Partial, Placement, Split
from autopar.ir.node import Value, output_node, set_values, value, values
from autopar.ir.program import Program
from autopar.ir.tables import Input, InputKind, Output, OutputKind
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.rules import Rule, call_of
from autopar.rules.factoring import Call, Factoring, Part, Strategy
from autopar.simulator.lockstep import Lockstep, Ranks
from autopar.split.choose import Choice, distinct
from autopar.split.flow import Flow, key_of
from autopar.split.split_axis import rewritten
from autopar.verification.placed import AXIS, OUTER, compare, garbage, pieces, zeros


@dataclass(frozen=True)
class Sample:
    """One call of an operator.

    weights: the tensors (by number) that are parameters; still: those that torch gives no gradient.
    outer: how many ranks hold each tensor on the other axis, with different values there (for collectives).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: tuple[int, ...] = ()
    still: tuple[int, ...] = ()
    outer: int = 1


@dataclass(frozen=True)
class Setting:
    """A sample on a mesh: its one-node program and the tensors of the ranks of the outer axis."""

    program: Program
    node: fx.Node
    tensors: list[list[Tensor]]  # for each placeholder one tensor per outer rank
    results: list[list[Tensor]]  # the same for each output, of the unsplit operator
    weights: frozenset[fx.Node]


@dataclass(frozen=True)
class Case:
    """One strategy of a rule for one call."""

    setting: Setting
    call: Call
    factoring: Factoring
    strategy: Strategy
    ways: int
    gradients: bool


def cases(target: Any, rule: Rule, sample: Sample, ways: int) -> Iterator[Case]:
    """Every strategy that ``rule`` has for a call of ``target`` on an axis of ``ways`` ranks, each once."""
    seen = set()
    for gradients in (True, False):
        setting = _setting(target, sample, ways, gradients)
        call = call_of(setting.node, setting.program.mesh, setting.weights)
        factoring = rule(call)
        for strategy in distinct(list(strategies(factoring, call, ways)), values(setting.node)):
            key = (strategy.inputs, strategy.outputs, strategy.part)
            if key not in seen:
                seen.add(key)
                yield Case(setting, call, factoring, strategy, ways, gradients)


def prove(case: Case) -> None:
    """Run the operator whole and on pieces. Raises WrongRuleError where outputs or gradients differ."""
    call, strategy = case.call, case.strategy
    try:
        _check_parts(case.factoring, strategy, case.ways)
        _check_strategy(case.setting, call, case.factoring, strategy, case.gradients)
    except Exception as problem:
        raise WrongRuleError(
            f"the rule of {call.target} is wrong: '{strategy.label}' over {case.ways} ranks\n"
            f"  call    {call.inputs} {_plain(call)}\n"
            f"  split   {_show(strategy.inputs)} -> {_show(strategy.outputs)}\n"
            f"  found   {problem}"
        ) from problem


def check(target: Any, rule: Rule, sample: Sample, ways: int) -> int:
    """The number of strategies of ``rule`` that were tried. Raises WrongRuleError for one that is wrong."""
    count = 0
    for count, case in enumerate(cases(target, rule, sample, ways), 1):  # noqa: B007
        prove(case)
    return count


def check_examples(target: Any, rule: Rule, examples: Sequence[tuple[Any, ...]]) -> None:
    """Prove ``rule`` on calls of an operator: tuples of arguments, a dict at the end for those by keyword.

    Raises WrongRuleError where a strategy is wrong, ValueError where a factor is split in no example.
    """
    factors: dict[str, None] = {}
    split = set()
    with torch.random.fork_rng(devices=()):
        for example, ways in itertools.product(examples, (2, 3)):
            for case in cases(target, rule, _sample(target, example), ways):
                prove(case)
                factors |= dict.fromkeys(f for f in case.factoring.sizes if f not in case.factoring.whole)
                split |= {case.strategy.part.factor} if case.strategy.part else set()
    untried = [factor for factor in factors if factor not in split]
    if untried:
        raise ValueError(
            f"no example splits factor '{untried[0]}' of {target}: give one in which its size divides by 2 or 3, "
            f"or add '; whole {untried[0]}' to the rule"
        )


def _sample(target: Any, example: tuple[Any, ...]) -> Sample:
    keywords = bool(example) and isinstance(example[-1], dict)
    args, kwargs = (example[:-1], dict(example[-1])) if keywords else (example, {})
    count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs)))
    return Sample(args, kwargs, still=() if _differentiable(target, args, kwargs) else tuple(range(count)))


def _differentiable(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch has a formula for the gradients of this call."""

    def fresh(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.dtype.is_floating_point or tensor.dtype.is_complex)

    args, kwargs = pytree.tree_map_only(Tensor, fresh, (args, kwargs))
    outputs = [tensor for tensor in _outputs(target(*args, **kwargs)) if tensor.requires_grad]
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not outputs:
        return False
    try:
        torch.autograd.grad(outputs, inputs, [torch.zeros_like(tensor) for tensor in outputs], allow_unused=True)
    except (RuntimeError, NotImplementedError) as problem:
        if "no autograd formula was registered" in str(problem) or "is not implemented" in str(problem):
            return False
        raise
    return True


def _show(placements: Sequence[Placement]) -> str:
    return ", ".join(map(str, placements))


def _plain(call: Call) -> str:
    return str(fx.map_arg((call.args, dict(call.kwargs)), lambda n: None))


def strategies(factoring: Factoring, call: Call, ways: int) -> Iterator[Strategy]:
    """Unsplit, partial, and every factor with every structure of blocks and segments that divides."""
    yield from factoring.unsplit(call)
    for factor in factoring.factors:
        size = factoring.sizes[factor]
        outers = [n for n in range(1, size + 1) if size % n == 0]
        for outer, ratio in itertools.product(outers, ((1,), (2, 1), (1, 2, 1))):
            for mirrored in (False, True)[: 1 + (outer % 2 == 0 and ratio == (1,))]:
                found = factoring.strategy(Part(factor, outer, ratio, mirrored), ways)
                if found:
                    yield found
    for dims in (*factoring.inputs, *factoring.outputs):
        for dim in range(len(dims)):
            part = factoring.part_of(dims, Split(dim), ways)
            found = factoring.strategy(part, ways) if part else None
            if found:
                yield found


# ---------------------------------------------------------------- the program of one node


def _setting(target: Any, sample: Sample, ways: int, gradients: bool) -> Setting:
    mesh = Mesh(**{OUTER: sample.outer, AXIS: ways})
    graph = fx.Graph()
    entries: list[Input] = []
    tensors: list[list[Tensor]] = []
    nodes: dict[int, fx.Node] = {}

    def placeholder(tensor: Tensor) -> fx.Node:
        if id(tensor) not in nodes:
            node = nodes[id(tensor)] = graph.placeholder(f"x{len(nodes)}")
            floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
            differentiable = gradients and floating and len(entries) not in sample.still
            set_values(node, Value(tensor.dtype, Layout.whole(tensor.shape), differentiable))
            kind = InputKind.PARAMETER if len(entries) in sample.weights else InputKind.INPUT
            entries.append(Input(node.name, kind, node.name))
            tensors.append(_outer_copies(tensor, sample.outer))
        return nodes[id(tensor)]

    args, kwargs = pytree.tree_map_only(Tensor, placeholder, (sample.args, sample.kwargs))
    node = graph.call_function(target, args, kwargs)
    before = list(nodes.values())
    lists = [[t.detach().requires_grad_(value(n).requires_grad) for t in ranks] for n, ranks in zip(before, tensors)]
    graph.output((node,))
    (found,) = Lockstep(Mesh(**{OUTER: sample.outer}), gradients=True).run(graph, lists.copy())
    graph.erase_node(output_node(graph))
    outputs = [list(_outputs(ranks)) for ranks in found]
    types = [Value(t.dtype, Layout.whole(t.shape), t.requires_grad) for t in outputs[0]]
    set_values(node, *types)
    several = not isinstance(found[0], Tensor)
    returned = [node]
    if several:
        returned = [graph.call_function(operator.getitem, (node, i)) for i in range(len(types))]
        for item, kind in zip(returned, types):
            set_values(item, kind)
    graph.output(tuple(returned))
    table = tuple(Output(OutputKind.USER, str(i)) for i in range(len(types)))
    program = Program(graph, mesh, Plan(), tuple(entries), table)
    weights = frozenset(n for n, entry in zip(before, entries) if entry.kind is InputKind.PARAMETER)
    return Setting(program, node, lists, [list(column) for column in zip(*outputs)], weights)


def _outer_copies(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor if i == 0 else torch.rand_like(tensor) for i in range(count)]


def _outputs(result: Any) -> Iterator[Tensor]:
    yield from [result] if isinstance(result, Tensor) else [item for item in result if isinstance(item, Tensor)]


def _forced(setting: Setting, call: Call, factoring: Factoring, strategy: Strategy) -> fx.Graph:
    """The graph of one rank when the node runs with ``strategy``, with its operands and results in these placements."""
    program, node = setting.program, setting.node
    flow = Flow(program, AXIS, program.mesh.size(AXIS), {node: call}, {node: factoring})
    for position, operand in enumerate(call.operands):
        flow.uses.setdefault(key_of(operand), []).append((node, position))
    returned = tuple(strategy.outputs)
    choice = Choice({node: strategy}, _given(setting, call, strategy), returned, {})
    return rewritten(flow, choice)


def _given(setting: Setting, call: Call, strategy: Strategy) -> dict[fx.Node, Placement]:
    """The placement of each placeholder, as required by its (first) use."""
    wanted: dict[fx.Node, Placement] = {}
    for operand, placement in zip(call.operands, strategy.inputs):
        wanted.setdefault(operand, placement)
    return wanted


# ---------------------------------------------------------------- comparing


def _check_parts(factoring: Factoring, strategy: Strategy, ways: int) -> None:
    """From a split that a strategy gives to a tensor, the rule finds a strategy with that split (how splits spread)."""
    if strategy.part is None:
        return
    tensors = (*factoring.inputs, *factoring.outputs)
    for position, placement in enumerate((*strategy.inputs, *strategy.outputs)):
        if isinstance(placement, Split):
            part = factoring.part_of(tensors[position], placement, ways)
            again = factoring.strategy(part, ways) if part else None
            same = again and (*again.inputs, *again.outputs)[position] == placement
            assert same, f"the split {placement} of {tensors[position]} leads to {part}, which does not have it"


def _check_strategy(setting: Setting, call: Call, factoring: Factoring, strategy: Strategy, gradients: bool) -> None:
    program, mesh = setting.program, setting.program.mesh
    graph = _forced(setting, call, factoring, strategy)
    places = _given(setting, call, strategy)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [
        pieces(whole, places[node], mesh, zeros if node in setting.weights else garbage)
        for node, whole in zip(placeholders, setting.tensors)
    ]
    for node, ranks in zip(placeholders, inputs):
        for part in ranks:
            part.requires_grad_(value(node).requires_grad)
    results = Lockstep(mesh, gradients=True).run(graph, inputs.copy())
    for index, (ranks, placement, whole) in enumerate(zip(results, strategy.outputs, setting.results)):
        compare(f"output {index}", ranks, placement, whole, mesh)
    kinds = [values(node)[0].layout.local_shape(mesh) for node in graph.find_nodes(op="output")[0].args[0]]
    for index, (ranks, shape) in enumerate(zip(results, kinds)):
        assert tuple(ranks[0].shape) == shape, f"output {index} is {tuple(ranks[0].shape)}, its layout says {shape}"
    flowing = [i for i, kind in enumerate(values(setting.node)) if kind.requires_grad]
    if gradients and flowing and strategy.label not in ("invariant", "replicated"):
        _check_gradients(setting, strategy, inputs, results, flowing, places)


def _check_gradients(
    setting: Setting, strategy: Strategy, inputs: list[Ranks], results: list[Ranks], flowing: list[int], places: Any
) -> None:
    mesh = setting.program.mesh
    placeholders = [node for node in setting.program.graph.nodes if node.op == "placeholder"]
    asked = [i for i, node in enumerate(placeholders) if value(node).requires_grad]
    cotangents = [[torch.randn_like(tensor) for tensor in setting.results[i]] for i in flowing]
    true = torch.autograd.grad(
        [tensor for i in flowing for tensor in setting.results[i]],
        [tensor for i in asked for tensor in setting.tensors[i]],
        list(itertools.chain(*cotangents)), retain_graph=True, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    given = [pieces(c, strategy.outputs[i], mesh, zeros, summands=True) for i, c in zip(flowing, cotangents)]
    outputs = [tensor for i in flowing for tensor in results[i]]
    live = [i for i, tensor in enumerate(outputs) if tensor.requires_grad]
    flat = list(itertools.chain(*given))
    found = torch.autograd.grad(
        [outputs[i] for i in live], [part for i in asked for part in inputs[i]], [flat[i] for i in live],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    count = len(setting.tensors[0])
    for slot, i in enumerate(asked):
        whole = list(true[slot * count : (slot + 1) * count])
        ranks = list(found[slot * mesh.world_size : (slot + 1) * mesh.world_size])
        placement = places[placeholders[i]]
        dual = Partial("sum") if placement == REPLICATED else REPLICATED if placement == Partial("sum") else placement
        weight = placeholders[i] in setting.weights
        compare(f"gradient of operand {i}", ranks, dual, whole, mesh, padding=not weight)
