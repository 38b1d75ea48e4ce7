"""Folded text: repeated blocks once, everything that differs in print, and the fold undone gives every line back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from autopar.analysis.fold import Fold, Line, folds
from autopar.analysis.folded_text import folded
from autopar.compiler import finish_program, split_program
from autopar.ir.batch import data_ways
from autopar.ir.node import Node, set_values, value
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.zoo.named import named_model
from tests.selection import slow_but


def program_of(model: str, mesh: Mesh, plan: Plan | None = None, finish: bool = False, **config: object) -> AnyProgram:
    example = named_model(model, config, ways=data_ways(mesh))
    program = split_program(example.model, mesh, plan or Plan(), (), example.batch)
    return finish_program(program) if finish else program


def unfolded(lines: list[Line], found: list[Fold]) -> list[Line]:
    """The lines again, from originals, rules and exceptions alone; outer folds are undone after inner ones."""
    known: dict[int, Line] = dict(enumerate(lines))
    for fold in found:
        for line in range(fold.start + fold.length, fold.stop):
            if line not in fold.exceptions:
                known.pop(line, None)
    for fold in sorted(found, key=lambda fold: (lines[fold.start].kind, fold.length)):
        for line in range(fold.start + fold.length, fold.stop):
            copy, place = fold.place(line)
            if line not in fold.exceptions:
                known[line] = _copied(known, fold, copy, place)
    return [known[line] for line in range(len(lines))]


def _copied(known: dict[int, Line], fold: Fold, copy: int, place: int) -> Line:
    original = known[fold.start + place]
    numbers = tuple(n + copy * fold.growth[place, i] for i, n in enumerate(original.numbers))
    refs = []
    for ref in original.refs:
        rule = fold.references.get(ref)
        if ref >= fold.start:
            refs.append(ref + copy * fold.length)
            continue
        assert rule is not None
        if rule.form == "same":
            refs.append(ref)
        elif rule.form == "carry":
            refs.append(fold.start + (copy - 1) * fold.length + rule.amount)
        elif rule.through is not None:
            refs.append(ref + copy * rule.amount * rule.through.length)
        else:
            wanted = tuple(n + copy * step for n, step in zip(known[ref].numbers, rule.steps))
            key = known[ref].key
            refs.append(
                next(i for i, line in known.items() if (line.key, line.numbers) == (key, wanted) and line.named)
            )
    return replace(original, refs=tuple(refs), numbers=numbers)


def same(one: Line, other: Line) -> bool:
    return (one.key, one.refs, one.numbers) == (other.key, other.refs, other.numbers)


CASES: list[tuple[str, Mesh, Plan, bool, dict[str, object]]] = [
    ("models.llama", Mesh(dp=2, tp=2), Plan(), False, {"layers": 6}),
    ("models.llama", Mesh(dp=2, tp=2), Plan(zero=3), True, {"layers": 6}),
    ("models.llama", Mesh(dp=2, tp=2), Plan(sequence="megatron"), False, {"layers": 6}),
    ("models.llama", Mesh(pp=3, tp=2), Plan(microbatches=3), True, {"layers": 9}),
    ("models.gpt", Mesh(dp=2), Plan(recompute="full"), True, {"layers": 6, "dropout": 0.1}),
    ("models.t5", Mesh(tp=2), Plan(), True, {"layers": 5}),
    ("models.moe", Mesh(dp=2, tp=2), Plan(), False, {"layers": 5}),
    ("models.unet", Mesh(dp=2), Plan(), True, {}),
]


@pytest.mark.parametrize("model, mesh, plan, finish, config", slow_but([0, 3, 5, 6], CASES))
def test_folds_say_exactly_what_they_hide(
    model: str,
    mesh: Mesh,
    plan: Plan,
    finish: bool,
    config: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Undone, the folds of every section of a program give its lines, and those of these models hide most of them."""
    seen: list[tuple[list[Line], list[Fold]]] = []

    def watched(lines: list[Line]) -> list[Fold]:
        seen.append((lines, folds(lines)))
        return seen[-1][1]

    monkeypatch.setattr("autopar.analysis.folded_text.folds", watched)
    program = program_of(model, mesh, plan, finish, **config)
    text = folded(program)
    assert text == folded(program)
    for lines, found in seen:
        assert all(same(one, other) for one, other in zip(lines, unfolded(lines, found), strict=True))
    assert model == "models.unet" or len(text.splitlines()) < 0.62 * len(str(program).splitlines())


@pytest.mark.slow
def test_llama_70b_on_one_screen() -> None:
    for plan in (Plan(), Plan(zero=3), Plan(sequence="megatron")):
        text = folded(program_of("models.llama:llama_70b", Mesh(dp=8, tp=8), plan, layers=12))
        assert len(text.splitlines()) < 86  # with the tables of autopar show: below 100
        assert "# blocks.1..11 as blocks.0 (p_blocks_0_attn_norm_weight to p_blocks_0_mlp_down_weight)" in text
        assert "-> all_gather(dp, dim=1)" in text if plan.zero else "-> enter(dp)" in text
        assert "comm.enter(p_" not in text and "comm.all_gather(p_" not in text


# ---------------------------------------------------------------- planted differences


def in_block(program: AnyProgram, number: int, operator: str) -> Node:
    """The first node of this operator in a block."""
    nodes = [node for node in program.graph.nodes if str(node.target).startswith(operator)]
    return nodes[number]


def another_constant(program: AnyProgram) -> str:
    node = in_block(program, 2 * 5, "aten.rms_norm")  # two norms in a block
    node.args = (*node.args[:3], 1e-3)
    return r"but in blocks\.5: rms_norm_10 = .*, 0\.001\)"


def another_operator(program: AnyProgram) -> str:
    node = in_block(program, 5, "aten.silu")
    node.target = torch.ops.aten.gelu.default
    return r"but in blocks\.5: silu_5 = aten\.gelu\("


def another_dtype(program: AnyProgram) -> str:
    node = in_block(program, 5, "aten.silu")
    set_values(node, replace(value(node), dtype=torch.float64))
    return r"but in blocks\.5: silu_5 = aten\.silu\(.* : f64"


def another_operand(program: AnyProgram) -> str:
    node = in_block(program, 5, "aten.silu")
    (other,) = (n for n in program.graph.nodes if n.name == "linear_32")  # of block 4
    node.args = (other,)
    return r"but in blocks\.5: silu_5 = aten\.silu\(linear_32\)"


def another_parameter(program: AnyProgram) -> str:
    """Block 5 computes with the weight of block 4: two parameters of one shape."""
    gates = [node for node in program.graph.nodes if node.name.startswith("p_blocks_") and "mlp_gate" in node.name]
    for user in list(gates[5].users):
        user.replace_input_with(gates[5], gates[4])
    return r"but in blocks\.5: linear_\d+ = aten\.linear\(\w+, \w+\)"


def another_line(program: AnyProgram) -> str:
    node = in_block(program, 5, "aten.silu")
    with program.graph.inserting_after(node):
        more = program.graph.call_function(torch.ops.aten.neg.default, (node,))
    set_values(more, value(node))
    return r"neg\w* += aten\.neg\(silu_5\)"


@pytest.mark.parametrize(
    "plant",
    slow_but(
        [1, 3], [another_constant, another_operator, another_dtype, another_operand, another_parameter, another_line]
    ),
)
def test_a_difference_in_one_middle_block_is_in_print(plant: Callable[[AnyProgram], str]) -> None:
    program = program_of("models.llama", Mesh(tp=2), layers=10).clone()
    before = folded(program)
    expected = plant(program)
    text = folded(program)
    assert re.search(expected, text), text
    assert not re.search(expected, before)
    assert len(text.splitlines()) < 3 * len(before.splitlines()), "the other blocks are folded all the same"


def test_a_number_that_grows_is_in_print() -> None:
    lines = [Line("start")] + [
        Line(f"op {j}", (4 * k + j,), (k * 3,) if j == 2 else ()) for k in range(8) for j in range(4)
    ]
    (found,) = folds(lines)
    assert (found.start, found.length, found.copies) == (1, 4, 8) and found.growth == {(2, 0): 3}


def test_short_or_rare_repetition_is_not_folded() -> None:
    assert not folds([Line("a"), Line("b"), Line("a"), Line("b")])
    assert not folds([Line(str(i)) for i in range(50)])


def test_time_grows_with_the_length() -> None:
    """Steps, not seconds: comparisons for 4 times as many blocks are about 4 times as many."""
    counts = []
    for blocks in (50, 200):
        count = 0

        class Counted(str):
            def __hash__(self) -> int:
                return str.__hash__(self)

            def __eq__(self, other: object) -> bool:
                nonlocal count
                count += 1
                return str.__eq__(self, other)  # type: ignore[arg-type]

        folds([Line(Counted(f"op {j}"), (max(60 * k + j - 1, 0),)) for k in range(blocks) for j in range(60)])
        counts.append(count)
    assert counts[1] < 6 * counts[0]


def test_stages_that_are_alike_are_printed_once() -> None:
    cuts = ("blocks.3", "blocks.6", "blocks.9")
    program = program_of("models.llama", Mesh(pp=4), Plan(cuts=cuts, microbatches=4), finish=True, layers=12)
    text = folded(program)
    assert re.search(r"stage 2 of 4 mesh\(.*\)\n  # as stage 1 of 4; blocks\.6\.\.8 for blocks\.3\.\.5; recv 1\.", text)
    norm = next(node for node in program.stages[2].graph.nodes if str(node.target).startswith("aten.rms_norm"))
    norm.args = (*norm.args[:3], 1e-3)
    assert "# as stage 1 of 4" not in folded(program) and "0.001" in folded(program)
