"""The structure of a program: each refusal of memory and of order, on code and schedules that are written by hand."""

from __future__ import annotations

import operator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autopar.compiler import compile_program
from autopar.errors import ProofError
from autopar.ir.node import set_values, value
from autopar.ir.program import PipelinedProgram
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.proof.rank_events import Collective, Event, Posting, Sending, Taking
from autopar.proof.rank_lines import read_code
from autopar.proof.structure import structure
from autopar.proof.structure_memory import check_memory
from autopar.proof.structure_order import check_order
from autopar.schedules.instructions import Kind, Message

MESH = Mesh(dp=2, tp=2)
HEAD = """
aten_add_Tensor = torch.add
aten_add__Tensor = torch.Tensor.add_
aten_mm = torch.mm
aten_neg = torch.neg
aten_view = torch.reshape
aten_mul__Tensor = torch.Tensor.mul_


def forward(comm, inputs):
    (x, w) = inputs
    inputs.clear()
"""


def refusals(*lines: str, mesh: Mesh = MESH) -> list[str]:
    """Of a function of ``x`` and ``w``."""
    (code,) = read_code(HEAD + "".join(f"    {line}\n" for line in lines)).values()
    return [str(refusal) for refusal in check_memory(code, mesh)]


START = 's = comm.start_all_reduce(y, "dp", "sum")'

RIGHT: list[tuple[str, ...]] = [
    ("y = aten_mm(x, w)", "z = aten_add__Tensor(y, x)", "return (z,)"),
    ("y = aten_mm(x, w)", START, "z = aten_neg(x)", 's = comm.wait(s, "dp")', "return (s, z)"),
    ("y = aten_mm(x, w)", 's = comm.all_reduce(y, "dp", "sum", in_place=True); del y', "return (s,)"),
    ("y = aten_mm(x, w)", 's = comm.all_reduce(y, "dp", "sum")', "z = aten_mul__Tensor(s, y)", "return (y, z)"),
]

WRONG: list[tuple[tuple[str, ...], str]] = [
    (("y = aten_add__Tensor(x, w)", "return (y,)"), "writes into the memory of the input 'x'"),
    (
        ("y = aten_mm(x, w)", "v = aten_view(y, [4])", "z = aten_add__Tensor(y, x)", "return (z, v)"),
        "writes into the memory of 'v', which a later line reads",
    ),
    (("y = aten_mm(x, w); del x", "z = aten_neg(x)", "return (z,)"), "'x' has no value here"),
    (("y = aten_mm(x, w)", "z = aten_neg(y); del y", "return (y, z)"), "return: 'y' has no value here"),
    (("y = aten_mm(x, w)", START, "return (y,)"), "nothing waits for it"),
    (("y = aten_mm(x, w)", START, "z = aten_neg(s)", "return (z,)"), "has yet to give"),
    (("y = aten_mm(x, w)", START, 's = comm.wait(s, "tp")', "return (s,)"), "it waits over tp for start_all_reduce"),
    (("y = aten_mm(x, w)", 'z = comm.wait(y, "dp")', "return (z,)"), "no collective that gives 'y' is under way"),
    (
        ("y = aten_mm(x, w)", START, "z = aten_add__Tensor(y, x)", 's = comm.wait(s, "dp")', "return (s,)"),
        "writes into what start_all_reduce (line 14) is still reading",
    ),
    (
        ("y = aten_mm(x, w)", 's = comm.all_reduce(y, "dp", "sum", in_place=True)', "z = aten_neg(y)", "return (s, z)"),
        "writes into the memory of 'y', which a later line reads",
    ),
    (
        (
            "y = aten_mm(x, w)", "v = aten_view(y, [4])", f"{START[:-1]}, in_place=True); del y",
            "z = aten_neg(v)", 's = comm.wait(s, "dp")', "return (s, z)",
        ),
        "it reads 'v', which start_all_reduce (line 15) is writing over",
    ),
    (("y = aten_mm(x, w)", START, "s = aten_neg(x)", "return (s,)"), "written anew before its collective has ended"),
]  # fmt: skip


@pytest.mark.parametrize("lines", RIGHT)
def test_memory_that_nobody_needs_may_be_written(lines: tuple[str, ...]) -> None:
    assert refusals(*lines) == []


@pytest.mark.parametrize("lines, words", WRONG, ids=[words for _, words in WRONG])
def test_memory_is_not_written_too_early(lines: tuple[str, ...], words: str) -> None:
    found = refusals(*lines)
    assert any(words in refusal and "likely cause: " in refusal for refusal in found), found


def test_a_sum_over_one_rank_is_its_operand() -> None:
    lines = ("y = aten_mm(x, w)", 's = comm.all_reduce(y, "dp", "sum")', "z = aten_mul__Tensor(s, x)", "return (y, z)")
    assert refusals(*lines) == []
    assert "writes into the memory of 'y'" in refusals(*lines, mesh=Mesh(tp=2))[0]
    started = ("y = aten_neg(x)", START, 's = comm.wait(s, "dp")', "z = aten_mul__Tensor(s, x)", "return (y, z)")
    assert refusals(*started) == []
    assert "writes into the memory of 'y'" in refusals(*started, mesh=Mesh(tp=2))[0]


def test_the_position_of_a_rank_is_not_written_to() -> None:
    found = refusals('i = comm.axis_index("dp")', "y = aten_add__Tensor(i, 1)", "return (y,)")
    assert "writes into the memory of the input 'axis_index'" in found[0]


def test_what_is_no_code_of_a_rank_is_an_error() -> None:
    with pytest.raises(ProofError, match="is no Python"):
        read_code("def forward(:")
    with pytest.raises(ProofError, match="has assignments, del and a return only"):
        read_code("def forward(comm, inputs):\n    print(inputs)\n")
    for line in ("torch.mm = torch.add", "torch = operator", "import os", "aten_mm = torch.mm(x, y)", "print(1)"):
        with pytest.raises(ProofError, match="imports and names of operators only"):
            read_code(f"import torch\n{line}{HEAD}    return (x,)\n")
    with pytest.raises(ProofError, match="has assignments, del and a return only"):
        read_code(f"{HEAD}    with torch.enable_grad():\n        y = aten_mm(x, w)\n    return (y,)\n")


def test_a_second_name_is_in_the_same_memory() -> None:
    found = refusals("y = aten_mm(x, w)", "z = y", "u = aten_add__Tensor(y, x)", "return (z, u)")
    assert any("writes into the memory of 'z'" in refusal for refusal in found), found


# ---------------------------------------------------------------- order


def sum_of(axis: str, shape: str = "f32[8]", operand: str = "") -> Collective:
    return Collective(axis, f"all_reduce over {axis} of {shape}", f"backward of {operand or axis}", operand, operand)


def order(*events: list[Event], mesh: Mesh) -> str:
    return "\n".join(str(refusal) for refusal in check_order(events, mesh))


def test_collectives_in_one_order_do_not_hang() -> None:
    assert order(*[[sum_of("dp"), sum_of("tp")]] * 4, mesh=MESH) == ""
    assert order([sum_of("dp")], mesh=Mesh(dp=1)) == ""


def test_ranks_that_wait_for_each_other_are_shown_as_a_circle() -> None:
    one: list[Event] = [sum_of("dp"), sum_of("tp")]
    other = one[::-1]
    found = order(one, other, other, one, mesh=MESH)
    assert "4 ranks [ranks 0 and 2]: wait for each other for ever" in found
    assert "rank 0 stands at all_reduce over dp of f32[8] (backward of dp), and waits for rank 2" in found


def test_collectives_that_do_not_match_are_refused() -> None:
    found = order([sum_of("dp")], [sum_of("dp", "f32[4]")], mesh=Mesh(dp=2))
    assert "collective 1 of ranks 0, 1 over dp [ranks 0 and 1]" in found and "f32[4]" in found


def test_operands_of_one_size_that_are_swapped_are_refused() -> None:
    one, other = sum_of("dp", operand="gate"), sum_of("dp", operand="up")
    assert order([one, other], [one, other], mesh=Mesh(dp=2)) == ""
    found = order([one, other], [other, one], mesh=Mesh(dp=2))
    assert "rank 0 sends 'gate'" in found and "rank 1 sends 'up'" in found and "of one size" in found


def test_a_rank_that_has_ended_is_named() -> None:
    found = order([sum_of("dp")], [], mesh=Mesh(dp=2))
    assert "rank 0 waits at all_reduce over dp of f32[8] (backward of dp) for rank 1, which has ended" in found


class Convolution(nn.Module):
    """Its input needs no gradient: the backward operator gives two tensors, at places 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum()  # type: ignore[no-any-return]


def test_types_of_operators_that_give_no_tensor_at_a_place() -> None:
    program = compile_program(Convolution(), Mesh(dp=2), Plan(check_numerics=False), (torch.randn(4, 3, 8, 8),))
    assert not structure(program).refusals
    backward = program.parts[0].required_role.backward
    assert backward is not None
    node = next(node for node in backward.nodes if node.target is operator.getitem)
    node.args = (node.args[0], 3 - node.args[1])  # type: ignore[operator]
    assert any(
        "<built-in function getitem> gives float32[" in refusal.problem for refusal in structure(program).refusals
    )


FORWARD, BACKWARD = Message(Kind.F, 0, 1, 0), Message(Kind.B, 1, 0, 0)


def test_a_schedule_that_hangs_is_shown_as_a_circle() -> None:
    found = order(
        [Posting(BACKWARD, 1), Taking(BACKWARD, 1, "B0.0"), Sending(FORWARD, 1)],
        [Posting(FORWARD, 0), Taking(FORWARD, 0, "F1.0"), Sending(BACKWARD, 0)],
        mesh=Mesh(pp=2),
    )
    assert "2 ranks [ranks 0 and 1]: wait for each other for ever:" in found
    assert "rank 0 stands at B0.0, which needs B1.0 -> 0, and waits for rank 1" in found


def test_a_schedule_that_hangs_only_where_sends_wait_is_refused() -> None:
    late: list[list[Event]] = [
        [Sending(FORWARD, 1), Posting(BACKWARD, 1), Taking(BACKWARD, 1, "B0.0")],
        [Sending(BACKWARD, 0), Posting(FORWARD, 0), Taking(FORWARD, 0, "F1.0")],
    ]
    found = order(*late, mesh=Mesh(pp=2))
    assert "wait for each other for ever where a send waits for its receiver" in found
    assert "rank 1 stands at SEND B1.0 -> 0, and waits for rank 0" in found and "post it before the send" in found
    assert order(*[[own[1], own[0], own[2]] for own in late], mesh=Mesh(pp=2)) == ""


def test_lines_of_a_pipeline_do_not_mix() -> None:
    """With tp=2 each rank sends to the one of its own place."""
    first: list[Event] = [Sending(FORWARD, 1)]
    second: list[Event] = [Posting(FORWARD, 0), Taking(FORWARD, 0, "F1.0")]
    assert order(first, first, second, second, mesh=Mesh(pp=2, tp=2)) == ""
    assert "rank 3 waits at F1.0, which needs F0.0 -> 1 for rank 1" in order(
        first, [], second, second, mesh=Mesh(pp=2, tp=2)
    )


def test_the_program_of_a_smaller_last_microbatch_is_looked_at_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    plan = Plan(microbatches=2, check_numerics=False)
    program = compile_program(Squared(model), Mesh(pp=2), plan, (), {"x": torch.randn(5, 4)})
    assert isinstance(program, PipelinedProgram) and program.tail is not None
    assert structure(program).refusals == ()
    backward = program.tail.stages[0].required_role.backward
    assert backward is not None
    node = next(node for node in backward.nodes if node.op == "call_function")
    set_values(node, replace(value(node), dtype=torch.float64))
    assert "the node says float64" in structure(program).refusals[0].problem


class Squared(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square().mean()
