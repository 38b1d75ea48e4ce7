"""``autopar.verify``: what it takes, what it gives, and how that is printed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

import autopar
from autopar.compiler import compile_program
from autopar.errors import ProofError
from autopar.ir import collectives as comm
from autopar.ir.node import output_node, value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.proof.report import Verification
from autopar.proof.structure import structure
from autopar.proof.structure_types import Types, is_ragged
from autopar.proof.verify import verify
from tests.proof.mutated_programs import made, right
from tests.proof.mutations import MUTATIONS, planted
from tests.proof.planting import graph_of, with_kinds

MODEL, BATCH = made("net")
QUICK = ("structure", "relations")


def wrong(*layers: str) -> Verification:
    (bug,) = (mutation for mutation in MUTATIONS if mutation.name == "bias_whose_gradient_is_that_of_one_rank")
    program, _ = planted(bug)
    return verify(MODEL, program.mesh, example_inputs=BATCH, program=program, layers=layers)


def test_a_right_program_is_proved_by_all_layers() -> None:
    found = verify(MODEL, Mesh(dp=2, tp=2), Plan(check_numerics=False), example_inputs=BATCH)
    assert found.proved and not found.refusals and not found.unproved, str(found)
    assert str(found).startswith("mesh(dp=2 tp=2): proved in ")
    shown = found.document()
    assert shown["proved"] and [row["layer"] for row in shown["layers"]] == list(autopar.proof.verify.LAYERS)
    assert json.loads(json.dumps(shown))["mesh"] == {"dp": 2, "tp": 2}
    facts = {words: count for row in shown["layers"] for words, count in row["shown"].items()}
    assert facts["gradients equal"] == 6 and facts["gradients that differ only where their parameter does"] == 6
    found.raise_if_refused()


def test_microbatches_of_two_sizes_are_two_programs() -> None:
    """8 rows in 3 parts of 4, 2 and 2, over two data ranks: what runs is the program of 4 rows, and that of 2."""
    plan = Plan(check_numerics=False, microbatches=3)
    found = verify(MODEL, Mesh(dp=2), plan, example_inputs=BATCH, layers=(*QUICK, "field"))
    assert found.proved and found.layers[2].facts["gradients equal"] == 6, str(found)
    rows = [value(node).shape[0] for node, _ in found.program.placeholders(InputKind.INPUT)]  # type: ignore[union-attr]
    assert rows == [4, 4]


def test_gradients_that_are_the_same_for_other_rows_may_be_summed() -> None:
    """Of a mean, nothing of which is squared: all rows, and so all ranks, have the same gradient of the last bias."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4), torch.nn.Flatten(0))
    found = verify(Mean(model), Mesh(dp=2), example_inputs=(torch.randn(4, 8),), layers=("relations", "field"))
    assert found.proved, str(found)


class Mean(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).mean()  # type: ignore[no-any-return]


def test_an_output_that_is_left_out_is_refused() -> None:
    model, batch = made("reporting")
    program = compile_program(model, Mesh(dp=2), Plan(check_numerics=False), (), batch)
    assert isinstance(program, Program)
    graph, outputs = program.graph, program.outputs
    end = output_node(graph)
    end.args = (end.args[0][:2],)  # type: ignore[index]
    role = program.required_role
    for each in {role.forward, role.inference}:
        last = output_node(each)
        results = list(last.args[0])  # type: ignore[arg-type]
        last.args = (tuple(results[:2] + results[3:]),)
    spec = pytree.tree_structure({"loss": 0, "size": 0})
    wrong = replace(program, outputs=outputs[:2], out_spec=spec)
    found = verify(model, Mesh(dp=2), example_inputs=batch, program=wrong, layers=("float64",))
    assert [one.where for one in found.refusals] == ["output turned"], str(found)


@pytest.mark.parametrize("axis", ["dp", "tp", "pp", "sp", "ep"])
def test_an_axis_of_one_rank(axis: str) -> None:
    found = verify(MODEL, Mesh(**{axis: 1}), example_inputs=BATCH, layers=QUICK)
    assert found.proved, str(found)


def test_positional_inputs_and_a_model_without_weights() -> None:
    model = copy.deepcopy(MODEL).to("meta")
    args = (BATCH["x"], BATCH["labels"])
    found = verify(model, Mesh(dp=2), Plan(check_numerics=False), example_inputs=args, layers=("structure", "float64"))
    assert found.unproved == ("the model has no weights: it is on the meta device",)
    assert not found.proved and not found.refusals and "not proved in" in str(found).splitlines()[0]


def test_a_wrong_program_is_refused() -> None:
    found = wrong(*QUICK)
    (refusal,) = found.refusals
    assert refusal.document()["cause"].startswith("a reduction over tp is missing")
    assert refusal.layer == "relations" and refusal.ranks == (0, 1) and "'down.bias'" in refusal.where
    assert "refused in" in str(found) and "refused: relations: backward: the gradient of 'down.bias'" in str(found)
    assert found.document()["layers"][1]["refusals"] == [refusal.document()]
    with pytest.raises(ProofError, match="(?s)does not compute its model's step:\n  relations: .*Way out: "):
        found.raise_if_refused()


@pytest.mark.parametrize("name", ["sends_in_another_order", "value_of_another_name"])
def test_a_program_that_cannot_be_executed_is_refused(name: str) -> None:
    (bug,) = (mutation for mutation in MUTATIONS if mutation.name == name)
    program, _ = planted(bug)
    model, batch = made("two layers")
    found = verify(model, program.mesh, example_inputs=batch, program=program)
    assert found.refusals and "it cannot be executed" in found.unproved[0]


def test_many_refusals_are_cut_in_the_report() -> None:
    (bug,) = (mutation for mutation in MUTATIONS if mutation.name == "bias_on_every_rank")
    program, _ = planted(bug)
    found = verify(MODEL, program.mesh, example_inputs=BATCH, program=program, layers=("float64",))
    assert len(found.refusals) == 8 and "... and 2 more refusals" in str(found)


def test_code_of_a_rank_that_computes_something_else_is_not_proved() -> None:
    program = right("net")
    code = program.rank(3).code  # type: ignore[union-attr]
    other = code.replace("aten_gelu(", "aten_neg(").replace("aten_gelu =", "aten_neg = torch.neg\naten_gelu =")
    found = verify(MODEL, program.mesh, example_inputs=BATCH, program=program, codes={3: other}, layers=("structure",))
    assert not found.refusals and not found.proved
    assert "rank 3: 'forward' was changed, and may compute something else" in found.unproved[0]
    same = verify(MODEL, program.mesh, example_inputs=BATCH, program=program, codes={3: code}, layers=("structure",))
    assert same.proved


def test_code_of_a_rank_with_the_position_of_another_is_not_proved() -> None:
    program = right("odd vocabulary")
    code = program.rank(1).code  # type: ignore[union-attr]
    assert "torch.tensor(1, device=comm.device)" in code and not structure(program, {1: code}).unproved
    found = structure(program, {1: code.replace("torch.tensor(1, device", "torch.tensor(0, device")})
    assert not found.refusals and "rank 1: 'forward' was changed" in found.unproved[0]
    missing = structure(program, {1: code[: code.index("def backward(")]})
    assert "rank 1: 'backward' is missing" in missing.unproved


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="layer 'types' is unknown\nWay out: some of structure, relations"):
        verify(MODEL, Mesh(dp=2), example_inputs=BATCH, layers=("types",))
    with pytest.raises(ValueError, match=r"layers=\(\): nothing would be proved"):
        verify(MODEL, Mesh(dp=2), example_inputs=BATCH, layers=())
    with pytest.raises(ValueError, match="looked at by the layer structure alone"):
        verify(MODEL, Mesh(dp=2), example_inputs=BATCH, codes={1: ""}, layers=("field",))
    with pytest.raises(ValueError, match=r"codes= of rank 2: mesh\(pp=2\) has 2"):
        verify(MODEL, Mesh(pp=2), example_inputs=BATCH, codes={2: ""})
    with pytest.raises(ValueError, match=r"the program is for mesh\(dp=2 tp=2\), not for mesh\(dp=2\)"):
        verify(MODEL, Mesh(dp=2), example_inputs=BATCH, program=right("net"))
    with pytest.raises(ValueError, match="a module that was built"):
        verify("net", Mesh(dp=2), example_inputs=BATCH)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mesh"):
        verify(MODEL, "dp=2", example_inputs=BATCH)  # type: ignore[arg-type]


def test_lines_of_sizes_that_are_known_at_run_time_only_have_their_dtype() -> None:
    program = right("ep").clone()
    graph, types = graph_of(program, "forward"), Types()
    assert not list(types.check(graph, program.mesh, "forward"))
    seen = types.seen
    node = next(node for node in graph.nodes if node.target not in comm.TARGETS and is_ragged(node) and node.args)
    with_kinds(node, dtype=torch.float16)
    (refusal, *_) = Types().check(graph, program.mesh, "forward")
    assert node.name in refusal.where and "the node says float16" in refusal.problem and seen > 0


def test_a_refusal_of_the_field_has_a_cause_of_its_own() -> None:
    found = wrong("field").refusals[0].document()
    assert found["layer"] == "field" and "times that of the model" not in found["cause"] and found["cause"]
    assert "nearest collective" not in found["problem"] and found["problem"]
