"""Why a value is laid out as it is: the choice on each axis, the cost of the alternatives, the collectives nearby.

    program.explain("layers.0.mlp.down.weight")   a parameter
    program.explain("linear_3")                   a node of the text form
    program.explain("layers.0.mlp")               a module: its parameters and its products
    program.explain("q_proj")                     all that has this in its path; *.q_proj.weight, a pattern

What is alike in many layers is said once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import fx

from autopar.analysis.layout_words import choice_words, machine_words, size_words
from autopar.cost.machine import ACCELERATOR
from autopar.ir.collectives import TARGETS, moving
from autopar.ir.node import Node, origin, values
from autopar.ir.operator_facts import is_product
from autopar.ir.program import AnyProgram
from autopar.ir.stacked_parameters import names_of_stacks
from autopar.ir.tables import Decision, InputKind

MOST = 12  # different explanations in one answer
NUMBER = re.compile(r"\d+")
COUNTED = re.compile(r"(?<=[a-z])_\d+\b")  # the number of a node: linear_3
OF_PATH = re.compile(r"(?<=\.)\d+(?=[.\s])")  # that of a layer: layers.3.mlp


def explain(program: AnyProgram, name: str) -> str:
    """A few lines on each of what ``name`` stands for. Raises ValueError for a name that stands for nothing."""
    found = _find(program, name)
    texts: dict[str, list[tuple[Node, str]]] = {}
    for node in found:
        text = _explained(program, node)
        texts.setdefault(_without_numbers(text) if len(found) > 1 else text, []).append((node, text))
    parts = []
    for alike in list(texts.values())[:MOST]:
        title, rest = alike[0][1].split("\n", 1) if "\n" in alike[0][1] else (alike[0][1], "")
        also = f"  (and {len(alike) - 1} alike, to {_title(program, alike[-1][0])})" if len(alike) > 1 else ""
        parts.append("\n".join(filter(None, [title + also, rest])))
    if len(texts) > MOST:
        parts.append(f"... and {len(texts) - MOST} more: name fewer of them, as {_title(program, found[0])}")
    return "\n\n".join(parts)


def _find(program: AnyProgram, name: str) -> list[Node]:
    nodes = {node.name: node for node in program.graph.nodes if node.op != "output"}
    targets = {alias: nodes[entry.node] for entry in program.inputs for alias in (entry.target, *entry.aliases)}
    for exact in (name, *names_of_stacks(name)):
        if exact in targets or exact in nodes:
            return [targets[exact] if exact in targets else nodes[exact]]
    of_parameters = {e.target: nodes[e.node] for _, e in program.placeholders(InputKind.PARAMETER, InputKind.BUFFER)}
    products = [node for node in nodes.values() if node.op == "call_function" and is_product(node.target)]
    if "*" in name:
        found = [node for target, node in of_parameters.items() if fnmatchcase(target, name)]
        found += [node for node in products if fnmatchcase(origin(node).module, name)]
    else:
        found = [node for target, node in of_parameters.items() if _within(name, target)]
        found += [node for node in products if _within(name, origin(node).module)]
    if found:
        return list(dict.fromkeys(found))
    modules = {origin(node).module for node in nodes.values()}
    near = difflib.get_close_matches(name, [*targets, *nodes, *filter(None, modules)], 3, 0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise ValueError(
        f"the program has no node or parameter '{name}'{hint}\n"
        "Way out: a parameter, a module, a part of their path (q_proj), or a pattern (*.q_proj.weight)."
    )


def _within(name: str, path: str) -> bool:
    """Whether the parts of ``name`` follow each other in ``path``."""
    return f".{name}." in f".{path}."


def _title(program: AnyProgram, node: Node) -> str:
    targets = {entry.node: entry.target for entry in program.inputs}
    return targets.get(node.name, node.name)


def _without_numbers(text: str) -> str:
    """``text`` as it is for each of many layers."""
    name, colon, rest = text.partition(": ")
    return NUMBER.sub("", COUNTED.sub("", name)) + colon + COUNTED.sub("", OF_PATH.sub("", rest))


def _explained(program: AnyProgram, node: Node) -> str:
    where, mesh = origin(node), program.mesh
    types = "; ".join(size_words(kind, mesh) for kind in values(node))
    lines = [f"{_title(program, node)}: {types or 'no tensor'}"]
    lines += [f"  module  {where.module}"] if where.module else []
    lines += [f"  source  {where.source}"] if where.source else []
    is_matrix = node.op == "placeholder" and any(len(kind.shape) == 2 for kind in values(node))
    for axis, decisions in program.decisions.items():
        if node.name in decisions or axis in mesh.names:
            lines += _choice(axis, decisions.get(node.name), _whole(node, axis), is_matrix)
    lines += [f"  needs   {_collective(source)}" for source in node.all_input_nodes if moving(source.target)]
    lines += [f"  then    {_collective(user)}" for user in node.users if moving(user.target)]
    return "\n".join(lines)


def _whole(node: Node, axis: str) -> str:
    """Where there was no choice: how the value is laid out on ``axis``."""
    kinds = values(node)
    if any(axis == name for kind in kinds for name, _ in kind.layout.partial):
        return "a summand on each rank"
    axes = {part for kind in kinds for dim in kind.layout.dims for factor in dim for name in factor.axes
            for part in name.split("+")}  # fmt: skip
    return f"split over {axis}" if axis in axes else "whole on every rank"


def _choice(axis: str, decision: Decision | None, whole: str, is_matrix: bool) -> Iterator[str]:
    if decision is None:
        yield f"  {axis:<7} {whole}: only one way to run it"
        return
    costs = [extra for extra in decision.alternatives.values() if not isinstance(extra, str)]
    words = choice_words(decision.chosen, is_matrix)
    over = f" over {axis}" if words.startswith("split") else ""
    yield f"  {axis:<7} {words}{over}{_reason(decision, costs)}"
    for label, extra in sorted(
        decision.alternatives.items(), key=lambda item: (isinstance(item[1], str), str(item[1]))
    ):
        other = choice_words(label, is_matrix)
        if isinstance(extra, str):
            yield f"          not {other}: {extra}"
        else:
            much = f"{abs(extra) * 1e6:.3g} us a step {'more' if extra >= 0 else 'less'}"
            yield f"          {other} would cost {much}"


def _reason(decision: Decision, costs: Sequence[float]) -> str:
    if not decision.alternatives:
        return ""
    if not costs:
        return ", because nothing else is possible:"
    if min(costs) < 0:
        return f", because the plan says so; for {machine_words(ACCELERATOR)}"
    return f", because that costs least on {machine_words(ACCELERATOR)}:"


def _collective(node: fx.Node) -> str:
    kind = values(node)[0]
    module = f", of {origin(node).module}" if origin(node).module else ""
    dims = f"[{', '.join(map(str, kind.shape))}]"
    return f"{node.name} = {TARGETS[node.target]} over {node.args[1]} of {dims}{module}"
