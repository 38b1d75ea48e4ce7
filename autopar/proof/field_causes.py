"""Why a value of a program is not that of the model: where the two part, and what is likely to be wrong there."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.errors import InvariantError
from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, values
from autopar.ir.program import AnyProgram
from autopar.ir.text import argument_text, operator_name
from autopar.mesh import Mesh
from autopar.proof import field
from autopar.proof.field_lockstep import FieldLockstep
from autopar.proof.field_reference import FieldStep
from autopar.proof.field_tensor import elements_of
from autopar.simulator.lockstep import Ranks
from autopar.simulator.parts import RanksDisagree, joined

FACTORS = 16  # a value that is so many times the right one, or a part of it, is said to be so


@dataclass(frozen=True)
class Difference:
    """A value that is not that of the model.

    Attributes:
        name: of the output or the gradient, with words for it.
        problem: what is wrong.
        cause: the likely cause.
        ranks: two that should hold the same and do not.
        node: the first line of the forward pass that differs, or the collective next to a gradient.
    """

    name: str
    problem: str
    cause: str = ""
    ranks: tuple[int, int] | None = None
    node: str = ""


def disagreement(problem: InvariantError) -> Difference:
    """What the simulator refused: ranks that hold different values, or a line that fails."""
    if isinstance(problem, RanksDisagree):
        one, other = problem.ranks
        words = f"ranks {one} and {other} should hold the same and do not"
        return Difference(problem.name, words, "a collective is missing, or has the wrong dual", problem.ranks)
    words, _, fix = str(problem).partition("\n")
    return Difference("all values", words, fix.removeprefix("Likely fix: ").partition("\n")[0])


class Seen:
    """The values of all nodes on all ranks, as they are computed."""

    def __init__(self, program: AnyProgram) -> None:
        self.program = program
        self.runs: list[tuple[Mesh, dict[str, dict[Node, Ranks]]]] = []

    def lockstep(self, mesh: Mesh) -> FieldLockstep:
        seen: dict[str, dict[Node, Ranks]] = {}
        self.runs.append((mesh, seen))
        return FieldLockstep(mesh, seen)

    def first_difference(self, wanted: FieldStep) -> tuple[Node, RanksDisagree | None] | None:
        """The first line of a forward pass that has its name and its line of code in the model, and another value."""
        for mesh, seen in self.runs:
            for node, ranks in seen.get("forward", {}).items():
                model = wanted.nodes.get(node.name)
                if node.op != "call_function" or not isinstance(model, Tensor) or len(values(node)) != 1:
                    continue
                (kind,) = values(node)
                if kind.shape != model.shape or origin(node) != wanted.origins.get(node.name):
                    continue
                try:
                    found = joined(node.name, [elements_of(part) for part in ranks], kind.layout, mesh) % field.PRIME
                except RanksDisagree as problem:
                    return node, problem
                except (InvariantError, AssertionError):
                    continue
                if not torch.equal(found, elements_of(model) % field.PRIME):
                    return node, None
        return None


def likely_causes(
    seen: Seen, wanted: FieldStep, found: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For the names of values that differ: the fields of :class:`Difference` that say why."""
    forward = any(not name.startswith("gradient of ") for name in names)
    first = seen.first_difference(wanted) if forward else None
    if first is not None:
        node, disagree = first
        where = f"{node.name} of {origin(node).module or 'the model'} ({origin(node).source})"
        problem = f"the first line of the forward pass that differs is {where}"
        if disagree is not None:
            problem += f": ranks {disagree.ranks[0]} and {disagree.ranks[1]} should hold the same and do not"
        near = _nearest_collective(node)
        cause = f"that line, or the collective before it: {_line(near)}" if near is not None else "that line"
        said = {"problem": problem, "cause": cause, "node": node.name, "ranks": disagree and disagree.ranks}
        return dict.fromkeys(names, said)
    if forward:
        problem = "the forward pass differs, though no line does that has its name and its place in the model"
        return dict.fromkeys(names, {"problem": problem, "cause": "a line that the compiler has made"})
    return {name: _of_gradient(seen, wanted.named.get(name), found.get(name), name) for name in names}


def _of_gradient(seen: Seen, wanted: Tensor | None, found: Tensor | None, name: str) -> dict[str, Any]:
    if wanted is None or found is None:
        return {}
    problem, cause = "the forward pass is right, and this is another function of the parameters and inputs", ""
    factor = _factor(elements_of(wanted), elements_of(found))
    if factor:
        problem = f"the forward pass is right, and this is {factor} times that of the model"
        cause = "reduced too often or not at all, or a wrong scale; "
    node = _result(seen, name)
    near = _nearest_collective(node) if node is not None else None
    if near is not None:
        return {"problem": problem, "cause": f"{cause}the nearest collective is {_line(near)}", "node": near.name}
    named = node.name if node is not None else ""
    return {"problem": problem, "cause": f"{cause}no collective stands before it", "node": named}


def _result(seen: Seen, name: str) -> Node | None:
    """The node of a backward graph that returns a gradient."""
    target = name.removeprefix("gradient of ")
    for part in seen.program.parts:
        role = part.required_role
        if role.backward is not None and target in role.grads:
            results: Any = next(node for node in reversed(role.backward.nodes) if node.op == "output").args[0]
            found = results[role.grads.index(target)]
            return found if isinstance(found, Node) else None
    return None


def _line(node: Node) -> str:
    """``all_reduce_9 = autopar.all_reduce(mm_1, "dp", "sum")``."""
    return f"{node.name} = {operator_name(node.target)}({', '.join(map(argument_text, node.args))})"


def _nearest_collective(node: Node) -> Node | None:
    """The nearest line that communicates, up the operands."""
    waiting, known = deque([node]), {node}
    while waiting:
        one = waiting.popleft()
        if comm.moving(one.target) is not None:
            return one
        for source in one.all_input_nodes:
            if source not in known:
                known.add(source)
                waiting.append(source)
    return None


def _factor(wanted: Tensor, found: Tensor) -> str:
    """The small rational number by which all elements differ, in words; "" where there is none."""
    place = int(wanted.flatten().argmax()) if wanted.numel() else 0
    if wanted.shape != found.shape or not wanted.numel() or field.has_codes(wanted) or field.has_codes(found):
        return ""
    ratio = found.flatten()[place] * field.inverse(wanted.flatten()[place]) % field.PRIME
    if not torch.equal(wanted * ratio % field.PRIME, found):
        return ""
    for count in range(FACTORS + 1):
        for text, value in ((str(count), count), (f"-{count}", -count)):
            if int(ratio) == value % field.PRIME:
                return text
        if count and int(ratio) == pow(count, -1, field.PRIME):
            return f"1/{count}"
    return ""
