"""Small random changes of right programs: what ``autopar.verify`` says of each, against numbers in float64.

``python -m tests.proof.random_mutations [--seed N] [--count N] [CASE ...]`` prints each change that the layers without
rounding accept though the numbers are wrong, those that they refuse though the numbers are right, and the table.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.ir import collectives as comm
from autopar.ir.node import origin, set_origin, set_values, values
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.proof.refusal import Layer
from autopar.proof.verify import verify
from tests.proof.mutated_programs import CASES, made, right
from tests.proof.mutations import described
from tests.proof.planting import drop

aten = torch.ops.aten
EXACT = (Layer.STRUCTURE, Layer.RELATIONS, Layer.FIELD)
RIGHT, REFUSED, UNPROVED, FALSE, ACCEPTED = "no change of numbers", "refused", "not proved", "false refusal", "ACCEPTED"
# operators of the same signature, one for another
SWAPS: dict[Any, Any] = {
    aten.add.Tensor: aten.sub.Tensor,
    aten.sub.Tensor: aten.add.Tensor,
    aten.mul.Tensor: aten.add.Tensor,
    aten.div.Scalar: aten.mul.Scalar,
    aten.mul.Scalar: aten.div.Scalar,
    aten.silu.default: aten.relu.default,
    aten.gelu.default: aten.relu.default,
    aten.rsqrt.default: aten.reciprocal.default,
    aten.sum.dim_IntList: aten.mean.dim,
    aten.exp.default: aten.sin.default,
}


@dataclass(frozen=True)
class Tried:
    """One change: in which program, where, what, and what came of it."""

    case: str
    change: str
    verdict: str
    by: str = ""


class Dice(random.Random):
    """Random choices, and the mesh of the program that they are made for."""

    mesh: Mesh


def _alike(one: fx.Node, other: fx.Node, mesh: Mesh) -> bool:
    """Whether a rank holds tensors of one size and dtype of both."""
    first, second = values(one)[0], values(other)[0]
    return first.dtype == second.dtype and first.layout.local_shape(mesh) == second.layout.local_shape(mesh)


def _calls(program: AnyProgram) -> list[fx.Node]:
    graphs = [graph for part in program.parts for graph in part.required_role.graphs.values()]
    return [node for graph in graphs for node in graph.nodes if node.op == "call_function"]


def _numbers(node: fx.Node) -> Iterator[tuple[int, Any]]:
    for place, given in enumerate(node.args):
        if isinstance(given, bool):
            yield place, not given
        elif isinstance(given, int):
            yield place, given + 1
            yield place, given - 1
        elif isinstance(given, float):
            yield place, given * 2
            yield place, -given


def another_number(node: fx.Node, dice: Dice) -> str:
    choices = list(_numbers(node))
    if not choices:
        return ""
    place, given = dice.choice(choices)
    was = node.args[place]
    node.update_arg(place, given)
    return f"argument {place}: {was} -> {given}"


def another_operand(node: fx.Node, dice: Dice) -> str:
    """An operand of the same type that was there before."""
    mine = [place for place, given in enumerate(node.args) if isinstance(given, fx.Node) and len(values(given)) == 1]
    if not mine:
        return ""
    place = dice.choice(mine)
    was = node.args[place]
    assert isinstance(was, fx.Node)
    before = []
    for other in node.graph.nodes:
        if other is node:
            break
        kinds = values(other) if other.op != "output" else ()
        if other is not was and len(kinds) == 1 and _alike(other, was, dice.mesh):
            before.append(other)
    if not before:
        return ""
    other = dice.choice(before)
    node.update_arg(place, other)
    return f"operand {place}: {was} -> {other}"


def operands_exchanged(node: fx.Node, dice: Dice) -> str:
    mine = [place for place, given in enumerate(node.args) if isinstance(given, fx.Node)]
    if len(mine) < 2:
        return ""
    one, two = dice.sample(mine, 2)
    first, second = node.args[one], node.args[two]
    node.update_arg(one, second)
    node.update_arg(two, first)
    return f"operands {one} and {two} exchanged"


def another_operator(node: fx.Node, dice: Dice) -> str:
    was = node.target
    if was not in SWAPS:
        return ""
    node.target = SWAPS[was]
    return f"{was} -> {node.target}"


def left_out(node: fx.Node, dice: Dice) -> str:
    """Its first operand in its place, where that has its type."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or len(values(node)) != 1 or len(values(first)) != 1:
        return ""
    if not _alike(first, node, dice.mesh):
        return ""
    drop(node)
    return "left out"


def twice(node: fx.Node, dice: Dice) -> str:
    if not node.args or not isinstance(node.args[0], fx.Node) or len(values(node)) != 1:
        return ""
    if len(values(node.args[0])) != 1 or not _alike(node.args[0], node, dice.mesh):
        return ""
    with node.graph.inserting_after(node):
        again = node.graph.call_function(node.target, (node, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]
    set_values(again, *values(node))
    set_origin(again, origin(node))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)
    return "twice"


def another_axis(node: fx.Node, dice: Dice) -> str:
    """Of a collective."""
    if comm.TARGETS.get(node.target) is None:
        return ""
    places = [place for place, given in enumerate(node.args) if isinstance(given, str) and given.split("+")[0] in AXES]
    if not places:
        return ""
    place = dice.choice(places)
    was = node.args[place]
    other = dice.choice([axis for axis in AXES if axis != was])
    node.update_arg(place, other)
    return f"{was} -> {other}"


AXES = ("dp", "tp", "sp", "ep")
CHANGES: tuple[Callable[[fx.Node, Dice], str], ...] = (
    another_number,
    another_operand,
    operands_exchanged,
    another_operator,
    left_out,
    twice,
    another_axis,
)


# ---------------------------------------------------------------- what is said of them


def changed(case: str, dice: Dice) -> tuple[AnyProgram, str, bool]:
    """A copy of the program with one change in it, the change in words, and whether it is where gradients come from."""
    whole = right(case)
    dice.mesh = whole.mesh
    while True:
        program = whole.clone()
        node = dice.choice(_calls(program))
        text = str(node.format_node())
        words = dice.choice(CHANGES)(node, dice)
        if words and described(program) != described(whole):
            trains = all(node.graph is not part.required_role.inference for part in program.parts)
            return program, f"{text.strip()}: {words}", trains


def tried(case: str, dice: Dice) -> Tried:
    program, words, trains = changed(case, dice)
    model, batch = made(CASES[case].model)

    def said(*layers: Layer) -> Any:
        return verify(model, program.mesh, example_inputs=batch, program=program, layers=layers)

    exact = said(*EXACT)
    if exact.refusals:
        by = exact.refusals[0].layer
        if by != Layer.FIELD or len({one.layer for one in exact.refusals}) > 1:
            return Tried(case, words, REFUSED, by)
        is_wrong = not trains or bool(said(Layer.FLOAT64).refusals)  # which makes no call without gradients
        return Tried(case, words, REFUSED if is_wrong else FALSE, by)
    numbers = said(Layer.FLOAT64)
    if exact.unproved:
        return Tried(case, words, UNPROVED, Layer.FLOAT64 if numbers.refusals else "")
    return Tried(case, words, ACCEPTED if numbers.refusals else RIGHT)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10, help="changes of each program")
    given = parser.parse_args(arguments)
    found: Counter[tuple[str, str]] = Counter()
    for case in given.cases or CASES:
        for number in range(given.count):
            dice = Dice(f"{given.seed} {case} {number}")
            try:
                one = tried(case, dice)
            except Exception as problem:
                print(f"RAISED {case} {number}: {type(problem).__name__}: {str(problem)[:500]}", flush=True)
                found["raised", ""] += 1
                continue
            found[one.verdict, one.by] += 1
            if one.verdict in (ACCEPTED, FALSE, UNPROVED):
                print(f"{one.verdict} {case} {number} ({one.by}): {one.change}", flush=True)
    for (verdict, by), count in sorted(found.items()):
        print(f"{count:5} {verdict} {by}")


if __name__ == "__main__":
    main()
