"""Planted bugs of a compiler are refused, all of them, by words that somebody can act on; what is right is accepted."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.proof.relations import relations
from autopar.proof.structure import structure
from autopar.proof.verify import verify
from tests.proof import mutations
from tests.proof.case_models import Hooked
from tests.proof.mutated_programs import CASES, made, right
from tests.proof.mutations import MUTATIONS, Mutation, verdict
from tests.selection import slow_but

CHEAP = (  # one of each class, on few programs
    "gradients_of_one_shape_in_another_order", "sums_over_two_axes_in_a_circle", "wait_left_out",
    "value_that_is_still_needed", "sends_in_another_order", "hangs_where_sends_wait", "gradient_over_dp",
    "moments_of_one_rank", "gradient_over_dp_twice", "bias_whose_gradient_is_that_of_one_rank", "bias_on_every_rank",
    "forward_over_dp_for_tp", "mean_of_the_means_of_microbatches", "keys_in_blocks_for_zig_zag",
    "causality_lost_at_a_seam", "keys_for_queries", "uneven_rows_off_by_one", "padded_rows_in_another_place",
    "gradients_of_the_other_half", "parameter_that_is_not_cast", "gradients_of_one_shape_exchanged",
    "gradient_doubled", "mean_of_own_rows", "weight_of_another_parameter_in_evaluation",
)  # fmt: skip
PLACES = [place for place, mutation in enumerate(MUTATIONS) if mutation.name in CHEAP]
USED = sorted({MUTATIONS[place].case for place in PLACES})


def test_there_are_enough() -> None:
    assert len(PLACES) == len(CHEAP)
    assert len(MUTATIONS) >= 155 and len({mutation.kind for mutation in MUTATIONS}) >= 33
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert {mutation.case for mutation in MUTATIONS} == set(CASES)


@pytest.mark.parametrize("mutation", slow_but(PLACES, MUTATIONS), ids=[mutation.name for mutation in MUTATIONS])
def test_bugs_are_refused(mutation: Mutation) -> None:
    found = verdict(mutation, every=False)
    (refusals,) = found.refusals.values()
    for refusal in refusals:
        assert refusal.where and refusal.problem, refusal
        assert refusal.cause or refusal.layer in ("field", "float64"), refusal
        assert len(refusal.ranks) in (0, 2) and (refusal.ranks or refusal.layer != "relations"), refusal


@pytest.mark.parametrize("case", slow_but([place for place, case in enumerate(CASES) if case in USED], list(CASES)))
def test_right_programs_are_accepted(case: str) -> None:
    assert not structure(right(case)).refusals
    assert not relations(right(case)).refusals


FIELD = ("odd vocabulary", "bf16")


@pytest.mark.parametrize("case", slow_but([place for place, case in enumerate(CASES) if case in FIELD], list(CASES)))
def test_right_programs_are_proved_in_a_field(case: str) -> None:
    """Padded columns of the vocabulary, and counts that bfloat16 would round, among them."""
    model, batch = made(CASES[case].model)
    program = right(case)
    assert verify(model, program.mesh, example_inputs=batch, program=program, layers=("field",)).proved


def test_a_hook_that_no_trace_has_is_seen_by_numbers_alone() -> None:
    """Gradients that are scaled within forward: the program and its source are alike, and neither is the model."""
    model, batch = Hooked().double(), {"x": torch.randn(4, 8).double(), "labels": torch.arange(4)}
    found = verify(model, Mesh(dp=2), Plan(check_numerics=False), example_inputs=batch, layers=("field", "float64"))
    assert {str(refusal.layer) for refusal in found.refusals} == {"float64"}
    assert "the gradient of 'up.weight'" in {refusal.where for refusal in found.refusals}


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["gradient_over_dp_twice", "--layer", "relations"]
    monkeypatch.setattr(sys, "argv", ["mutations", *chosen])
    mutations.main()
    shown = capsys.readouterr().out
    assert "doubled reduction: gradient_over_dp_twice (dp tp)\n  refused by relations\n" in shown
    assert "relations  refuses   1, as the first   1" in shown and "accepted by all: 0" in shown
    monkeypatch.setattr(sys, "argv", ["mutations", *chosen, "--json"])
    mutations.main()
    (row,) = json.loads(capsys.readouterr().out)
    assert row["layers"] == ["relations"] and row["contracts"] is False and "counts it again" in row["message"]
