"""Passes and their runner: contracts, dumps, and the evidence that a failure leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autopar.errors import AutoparError, IndivisibleError, InvariantError, ProgramFileError
from autopar.ir.graph_pass import Pass, count_difference, graph_pass, read_replay, run_passes
from autopar.ir.invariants import every_value_has_a_layout, no_partial_value_escapes
from autopar.ir.node import set_values, value
from autopar.ir.parse import parse
from autopar.ir.program import Program
from autopar.plan import Plan
from tests.conftest import Golden
from tests.texts import MLP, ROLES, node_of


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUTOPAR_DUMP", raising=False)
    monkeypatch.setenv("AUTOPAR_DUMP_DIR", ".")


@graph_pass(requires=(every_value_has_a_layout,), ensures=(no_partial_value_escapes,))
def replace_gelu(program: Program) -> Program:
    """Rewrites gelu to two operators."""
    graph, gelu = program.graph, node_of(program, "gelu")
    with graph.inserting_before(gelu):
        relu = graph.call_function(torch.ops.aten.relu.default, gelu.args)
        neg = graph.call_function(torch.ops.aten.neg.default, (relu,))
    for node in (relu, neg):
        set_values(node, value(gelu))
    gelu.replace_all_uses_with(neg)
    graph.erase_node(gelu)
    return program


@graph_pass()
def drop_reduction(program: Program) -> Program:
    node = node_of(program, "all_reduce")
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    program.graph.erase_node(node)
    return program


def failing(error: Exception) -> Pass:
    def fail(program: Program) -> Program:
        raise error

    return graph_pass()(fail)


# ---------------------------------------------------------------- running


def test_passes_run_in_order_on_copies() -> None:
    program = replace(parse(MLP), passes=("trace",))
    after = run_passes(program, [replace_gelu, drop_reduction])
    assert after.passes == ("trace", "replace_gelu", "drop_reduction")
    assert str(program) == MLP
    assert program.passes == ("trace",)
    assert "aten.neg(relu_default)" in str(after) and "all_reduce" not in str(after)


def test_only_the_program_that_was_given_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, seen = list[str](), list[str]()
    clone = Program.clone
    monkeypatch.setattr(Program, "clone", lambda self: (copied.append(str(self)), clone(self))[1])

    @graph_pass(when=lambda program: False)
    def skipped(program: Program) -> Program:
        raise AssertionError

    @graph_pass()
    def look(program: Program) -> Program:
        seen.append(str(program))
        return program

    program = parse(MLP)
    after = run_passes(program, [skipped, replace_gelu, look, drop_reduction])
    assert copied == [MLP] and str(program) == MLP
    assert seen == [str(replace_gelu(parse(MLP)))]
    assert "aten.neg(relu_default)" in str(after) and "all_reduce" not in str(after)


def test_users_are_in_the_order_of_the_graph_where_nothing_is_copied() -> None:
    """A pass puts what it makes before the first user, which an earlier pass may have added as the last one."""

    def first_users(program: Program) -> list[list[str]]:
        return [[user.name for user in node.users] for node in program.graph.nodes]

    @graph_pass()
    def add_a_first_user(program: Program) -> Program:
        gelu = node_of(program, "gelu")
        with program.graph.inserting_before(gelu):
            relu = program.graph.call_function(torch.ops.aten.relu.default, gelu.args)
            total = program.graph.call_function(torch.ops.aten.add.Tensor, (relu, gelu.args[0]))
        for node in (relu, total):
            set_values(node, value(gelu))
        gelu.replace_all_uses_with(total)
        program.graph.erase_node(gelu)
        operand = relu.all_input_nodes[0]
        users = list(operand.users)
        operand.users.clear()
        operand.users.update(dict.fromkeys(reversed(users)))
        return program

    seen: list[list[list[str]]] = []

    @graph_pass()
    def look(program: Program) -> Program:
        seen.append(first_users(program))
        return program

    run_passes(parse(MLP), [add_a_first_user, look])
    seen.append(first_users(add_a_first_user(parse(MLP)).clone()))
    assert seen[0] == seen[1]


def test_no_passes() -> None:
    program = parse(MLP)
    assert run_passes(program, []) is program


def test_a_pass_is_called_like_the_function_it_is() -> None:
    assert replace_gelu.name == "replace_gelu"
    assert replace_gelu.__doc__ == "Rewrites gelu to two operators."
    assert "aten.relu" in str(replace_gelu(parse(MLP)))


def test_roles_are_copied_too() -> None:
    @graph_pass()
    def rename(program: Program) -> Program:
        for node in program.required_role.forward.nodes:
            if node.name == "linear":
                node.args = (node.args[0], node.args[0])
        return program

    program = parse(ROLES)
    before = str(program)
    assert "aten.linear(x, x)" in str(rename(program))
    assert str(program) == before


def test_contracts_are_checked_before_and_after() -> None:
    untyped = parse(MLP.replace("aten.gelu(linear)                : f32[4@dp,16,32@tp]", "aten.gelu(linear)"))
    with pytest.raises(InvariantError, match="gelu: aten.gelu.default has no layout"):
        replace_gelu(untyped)
    careful = graph_pass(ensures=(no_partial_value_escapes,))(drop_reduction.rewrite)
    with pytest.raises(InvariantError, match="linear_1: output result is a pending sum over axis 'tp'"):
        careful(parse(MLP))


def test_a_graph_in_a_wrong_order() -> None:
    @graph_pass()
    def swap(program: Program) -> Program:
        node_of(program, "linear_1").prepend(node_of(program, "all_reduce"))
        return program

    with pytest.raises(InvariantError, match="'linear_1'.*was used before it has been defined!.*\nLikely fix: "):
        swap(parse(MLP))


def test_a_pass_that_returns_nothing() -> None:
    with pytest.raises(InvariantError, match="returned NoneType"):
        graph_pass()(lambda program: None)(parse(MLP))  # type: ignore[arg-type,return-value]


# ---------------------------------------------------------------- dumps


def test_nothing_is_printed_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    run_passes(parse(MLP), [replace_gelu, drop_reduction])
    assert capfd.readouterr() == ("", "")


def test_dump_after_all_passes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    monkeypatch.setenv("AUTOPAR_DUMP", "all")
    run_passes(parse(MLP), [replace_gelu, drop_reduction, graph_pass()(lambda program: program)])
    out, err = capfd.readouterr()
    assert out == ""
    golden("dump", err.replace("<lambda>", "nothing"))


def test_dump_after_some_passes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_DUMP", " drop_reduction, no_such")
    run_passes(parse(MLP), [replace_gelu, drop_reduction])
    err = capfd.readouterr().err
    assert "# AUTOPAR_DUMP: no pass here is called 'no_such'; there are replace_gelu, drop_reduction\n" in err
    assert "# drop_reduction: all_reduce 1 -> 0\nprogram mesh" in err
    assert "# replace_gelu" not in err


def test_counts_of_roles() -> None:
    bare = replace(parse(ROLES), role=None)
    assert count_difference(bare, parse(ROLES)) == "forward: 6 nodes; backward: 6 nodes; inference: 4 nodes"
    assert count_difference(bare, bare) == "the same operators"


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("error", [IndivisibleError("6 heads over tp=4"), ValueError("tensor='diagonal'")])
def test_errors_of_users_keep_their_type_and_get_a_note(error: Exception, golden: Golden) -> None:
    with pytest.raises(type(error)) as caught:
        run_passes(parse(MLP), [replace_gelu, failing(error)])
    assert caught.value is error
    golden("pass_failure_note", error.__notes__[0])


def test_other_errors_are_chained() -> None:
    cause = KeyError("weight")
    with pytest.raises(AutoparError, match="KeyError in pass fail: 'weight'\nIn pass fail; ") as caught:
        run_passes(parse(MLP), [failing(cause)])
    assert caught.value.__cause__ is cause
    assert "autopar replay autopar-failed-fail.txt --pass fail" in str(caught.value)


def test_the_program_before_the_failure_can_be_replayed() -> None:
    plan = Plan(sequence="megatron", tensor={"*.up": "column"}, batch_dims={"x": None}, seed=3)
    with pytest.raises(InvariantError):
        careful = graph_pass(ensures=(no_partial_value_escapes,))(drop_reduction.rewrite)
        run_passes(parse(MLP, plan), [replace_gelu, careful])
    path = Path("autopar-failed-drop_reduction.txt")
    again = read_replay(path)
    assert again.plan == plan
    assert str(again) == str(replace_gelu(parse(MLP)))
    assert "# it went through: replace_gelu\n" in path.read_text()
    assert "all_reduce" not in str(drop_reduction(again))
    assert not list(Path().glob("*.tmp"))


def test_without_a_wish_a_failure_leaves_nothing_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTOPAR_DUMP_DIR")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IndivisibleError) as caught:
        run_passes(parse(MLP), [failing(IndivisibleError("6 over 4"))])
    left = tmp_path / "cache" / "autopar" / "autopar-failed-fail.txt"
    assert str(left) in caught.value.__notes__[0] and read_replay(left).mesh == parse(MLP).mesh
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_failure_that_cannot_be_written_down_is_still_the_failure() -> None:
    Path("autopar-failed-fail.txt").mkdir()
    with pytest.raises(IndivisibleError) as caught:
        run_passes(parse(MLP), [failing(IndivisibleError("6 over 4"))])
    assert "could not be written to autopar-failed-fail.txt" in caught.value.__notes__[0]
    assert not list(Path().glob("*.tmp"))


@pytest.mark.parametrize("content", [None, "# plan: {\nprogram mesh()\n return", '# plan: {"no": 1}\n', "nonsense"])
def test_a_replay_of_something_else(content: str | None) -> None:
    if content is not None:
        Path("file.txt").write_text(content)
    with pytest.raises(ProgramFileError):
        read_replay("file.txt")


def test_a_pass_that_is_not_needed_neither_runs_nor_copies() -> None:
    ran: list[Program] = []
    step = graph_pass(when=lambda program: bool(program.plan.zero))(lambda program: ran.append(program) or program)  # type: ignore[func-returns-value]
    for stage, runs in ((0, 0), (1, 1)):
        program = parse(MLP, Plan(zero=stage))
        after = step(program)
        assert len(ran) == runs and (after.graph is program.graph) == (not runs) and after.passes == (step.name,)
