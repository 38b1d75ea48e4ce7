"""Digits of tokens and experts: through views that split and join dims, and what is refused."""

from __future__ import annotations

import pytest

from autopar.experts.digits import EXPERT, OTHER, TOKEN, Digit, Located, Places, Unaligned, counted, joined
from autopar.ir.node import Node
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.mesh import Mesh
from autopar.rules import call_of, rule_for

TOKENS, EXPERTS, WIDTH = (Digit(TOKEN, 12),), (Digit(EXPERT, 4),), (Digit(OTHER, 8),)


def located(line: str, known: dict[str, Places]) -> Located:
    """The call of the last node; ``known``: places of the first operand ("x") and of the result ("y")."""
    program = parse(f"program mesh()\n  {line}\n  return y\n")
    assert isinstance(program, Program)
    node: Node = next(node for node in program.graph.nodes if node.name == "y")
    call, rule = call_of(node, Mesh()), rule_for(node.target)
    assert rule is not None
    factoring = rule(call)
    tensors = {"x": factoring.inputs[0], "y": factoring.outputs[0]}
    return Located.by(call, factoring, [(tensors[name], places) for name, places in known.items()])


def view(shape: str, target: str, to: str) -> str:
    return f"x = input x : f32[{shape}]\n  y = {target} : f32[{to}]"


def test_a_dim_of_two_numbers_is_taken_apart_and_joined() -> None:
    line = view("4,12,8", "aten.reshape(x, [48, 8])", "48,8")
    assert located(line, {"x": (EXPERTS, TOKENS, WIDTH)}).result() == ((*EXPERTS, *TOKENS), WIDTH)
    assert located(line, {"y": ((*EXPERTS, *TOKENS), WIDTH)}).operand(0) == (EXPERTS, TOKENS, WIDTH)


def test_the_tokens_of_batch_and_sequence_are_digits_of_one_number() -> None:
    batch, sequence = counted(TOKEN, [3, 4])
    assert (batch, sequence) == ((Digit(TOKEN, 3, 4),), (Digit(TOKEN, 4, 1),)) and joined(batch + sequence) == TOKENS
    line = view("12,4", "aten.reshape(x, [3, 4, 4])", "3,4,4")
    assert located(line, {"x": (TOKENS, EXPERTS)}).result() == (batch, sequence, EXPERTS)


def test_a_repeated_tensor_is_the_same_for_all_experts() -> None:
    line = view("12,8", "aten.repeat(x, [4, 1])", "48,8")
    found = located(line, {"y": ((*EXPERTS, *TOKENS), WIDTH)})
    assert found.operand(0) == (TOKENS, WIDTH)


def test_numbers_that_are_summed_are_gone() -> None:
    line = view("12,4,8", "aten.sum.dim_IntList(x, [1])", "12,8")
    found = located(line, {"x": (TOKENS, EXPERTS, WIDTH)})
    assert found.result() == (TOKENS, WIDTH) and found.gone == list(EXPERTS)


REFUSED = {
    view("12,8", "aten.reshape(x, [8, 12])", "8,12"): (TOKENS, WIDTH),  # neither size divides the other
    view("12,4", "aten.cumsum(x, 1)", "12,4"): (TOKENS, EXPERTS),
    view("12,4", "aten.select.int(x, 1, 2)", "12"): (TOKENS, EXPERTS),
    view("12,4", "aten.flip(x, [0])", "12,4"): (TOKENS, EXPERTS),
}


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line.partition("aten.")[2].partition("(")[0])
def test_what_does_not_treat_each_alone_is_refused(line: str) -> None:
    with pytest.raises(Unaligned):
        located(line, {"x": REFUSED[line]}).result()


def test_other_elements_may_be_worked_along() -> None:
    line = view("12,4,8", "aten.cumsum(x, 2)", "12,4,8")
    assert located(line, {"x": (TOKENS, EXPERTS, WIDTH)}).result() == (TOKENS, EXPERTS, WIDTH)
