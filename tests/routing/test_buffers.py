"""Buffers with a fixed number of seats for each expert: exact by the rule that drops rows, on every axis."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.check import Reference, Report
from autopar.errors import NothingSplitError
from autopar.mesh import Mesh
from autopar.models import moe
from autopar.plan import Plan
from tests.dropping import limited, ranks_of_tokens
from tests.passes.test_route_experts import WIDTH, Experts, NoAuxiliary, batch, checked, reference, split
from tests.selection import one_each, slow_but

ROWS, LENGTH = 12, 8
MORE_THAN_ENOUGH = 100.0


def moved(report: Report, phase: str) -> list[tuple[str, int, int]]:
    """What the exchanges of a phase send: axis, how many there are, bytes of a rank."""
    return [(t.axis, t.operations, t.bytes) for t in report.step.traffic if (t.phase, t.name) == (phase, "all_to_all")]


def counted(report: Report) -> int:
    """The choices that were dropped, by the load that is counted, of all those of the whole batch."""
    (load,) = report.step.expert_load.values()
    assert sum(load.experts) == sum(load.ranks) == 2 * ROWS * LENGTH
    return load.lost


@pytest.mark.parametrize("kind", ["usual", "alike"])
@pytest.mark.parametrize("factor", [0.2, 1.0, 1.7])
@pytest.mark.parametrize("experts", [12, 10, 3])
@pytest.mark.parametrize("ways", slow_but([0, 3], [1, 2, 3, 6]))
def test_drops_by_the_rule_of_each_rank(ways: int, experts: int, factor: float, kind: str) -> None:
    """Uneven parts, ranks without an expert, and experts that all tokens, or none, choose."""
    given, dropped = limited(reference(experts, kind), ranks_of_tokens(ROWS, LENGTH, ways), factor)
    assert dropped or factor > 1
    report = checked(given.check(Mesh(ep=ways), Plan(capacity_factor=factor)), 1e-10 if kind == "alike" else 1e-12)
    assert len(moved(report, "forward")) == len(moved(report, "backward")) == (ways > 1)
    assert counted(report) == dropped


@pytest.mark.parametrize("mesh", ["ep=1", "ep=2", "ep=4", "tp=2", "dp=2,ep=3", "ep=2,tp=2"])
def test_with_enough_seats_it_is_the_model(mesh: str) -> None:
    whole = reference(10, biased=True)
    buffered = checked(whole.check(Mesh.parse(mesh), Plan(capacity_factor=MORE_THAN_ENOUGH)))
    dropless = checked(whole.check(Mesh.parse(mesh), Plan()))
    assert buffered.step.loss is not None and dropless.step.loss is not None
    assert torch.allclose(buffered.step.loss, dropless.step.loss, rtol=1e-14, atol=0)


AXES: list[tuple[str, dict[str, Any], tuple[int, int, int]]] = [
    ("dp=2,ep=3", {}, (6, 1, 1)),
    ("dp=3", {}, (3, 1, 1)),
    ("tp=2", {}, (1, 1, 1)),  # inside experts
    ("ep=2,tp=2", {"expert_axes": "ep"}, (2, 1, 1)),
    ("ep=2,tp=2", {"expert_axes": "ep+tp"}, (2, 1, 2)),
    ("ep=2,tp=2", {"expert_axes": "ep+tp", "sequence": "megatron"}, (2, 2, 1)),
    ("tp=3", {"expert_axes": "tp"}, (1, 1, 3)),
    ("ep=2,sp=2", {"expert_axes": "ep"}, (2, 2, 1)),
    ("ep=2,sp=2", {"expert_axes": "ep+sp"}, (2, 2, 1)),
    ("dp=2,ep=2,sp=2", {"zero": 3, "expert_axes": "ep"}, (4, 2, 1)),
    ("ep=2,sp=2,tp=2", {"expert_axes": "ep+sp+tp"}, (2, 2, 2)),
    ("pp=2,ep=2", {"microbatches": 3}, (6, 1, 1)),
    ("pp=2,ep=2,tp=2", {"microbatches": 2, "expert_axes": "ep+tp"}, (4, 1, 2)),
    ("ep=2", {"recompute": "full"}, (2, 1, 1)),
    ("dp=2,ep=2", {"zero": 1}, (4, 1, 1)),
    ("dp=2,ep=3", {"zero": 2, "recompute": "selective"}, (6, 1, 1)),
    ("dp=2,ep=2", {"zero": 3}, (4, 1, 1)),
    ("ep=2", {"overlap_mb": 0.0}, (2, 1, 1)),
]


@pytest.mark.parametrize(
    ("mesh", "plan", "ranks", "experts"),
    one_each(AXES, [12, 10]),
    ids=[f"{m}-{'-'.join(map(str, p))}-{experts}" for m, p, _ in AXES for experts in (12, 10)],
)
def test_every_other_axis(mesh: str, plan: dict[str, Any], ranks: tuple[int, int, int], experts: int) -> None:
    """The rows of a rank are a group of their own, where ``tp`` shares them out too, and those of a microbatch."""
    dims = {"ids": 1, "labels": 1} if "sp" in mesh else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of statistics of microbatches
        whole = Reference(NoAuxiliary(experts, biased=True), batch()) if "microbatches" in plan else None
        whole = whole or reference(experts, biased=True)
        given, dropped = limited(whole, ranks_of_tokens(ROWS, LENGTH, *ranks), 1.0)
        assert dropped > 10
        report = checked(given.check(Mesh.parse(mesh), Plan(capacity_factor=1.0, sequence_dims=dims, **plan)))
    assert counted(report) == dropped


@pytest.mark.parametrize("mesh", ["ep=1", "dp=2", "ep=3", "dp=2,ep=2"])
def test_experts_that_the_plan_places(mesh: str) -> None:
    """Whole experts have no place; the rows that are dropped are the same."""
    on, order = Mesh.parse(mesh), (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    ranks = ranks_of_tokens(ROWS, LENGTH, on.world_size)
    given, dropped = limited(reference(10, biased=True), ranks, 0.8)
    report = checked(given.check(on, Plan(capacity_factor=0.8, expert_placement={"*": order})))
    assert counted(report) == dropped > 0


def test_bytes_are_those_of_the_buffers() -> None:
    """Equal parts, whatever the load is, and nothing of a size that ranks know at run time only."""
    for kind in ("usual", "alike"):
        report = reference(10, kind).check(Mesh(ep=4), Plan(capacity_factor=1.5))
        seats = -(-3 * 2 * ROWS * LENGTH // (2 * 4 * 10))
        buffer = 4 * 3 * seats * WIDTH * 8  # each rank has room for three experts
        assert moved(report, "forward") == moved(report, "backward") == [("ep", 2, 2 * buffer * 3 // 4)]
        text = str(report.program)
        assert "?@" not in text and "row_sizes" not in text


@pytest.mark.parametrize("recompute", ["selective", "full", 0.2])
def test_recomputation_sends_nothing_again(recompute: str | float) -> None:
    model = moe.build("tiny", layers=2, balance=0.05)
    given = Reference(model, moe.example_batch(moe.PRESETS["tiny"], ROWS, 24, seed=0))
    report = checked(given.check(Mesh(ep=2), Plan(capacity_factor=MORE_THAN_ENOUGH, recompute=recompute)))
    assert [count for _, count, _ in moved(report, "backward")] == [4], "two for each layer"


def test_rows_that_are_repeated_before_the_experts_wait_for_all_first_choices() -> None:
    """Rows that scores multiply are one for each choice; how many a token has, its topk says."""

    class Scaled(Experts):
        def _routed(self, rows: Tensor, chosen: Tensor) -> Tensor:
            ids = chosen.reshape(-1)
            picked = rows.repeat_interleave(2, 0) * (1 + ids.to(rows.dtype)).unsqueeze(1)
            gate, up = torch.bmm(self.up[ids], picked.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
            return torch.bmm(self.down[ids], (gate * up).unsqueeze(-1)).squeeze(-1)

    program = split(Scaled(12), "ep=2", capacity_factor=1.0)
    (seat_rows,) = [node for node in program.graph.nodes if node.name == "seat_rows"]
    assert seat_rows.args[4] == 2


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "1.0", True], ids=repr)
def test_a_factor_is_a_number_above_zero(factor: Any) -> None:
    with pytest.raises(ValueError, match="Plan\\(capacity_factor=.*a number above 0"):
        Plan(capacity_factor=factor)


def test_a_model_without_experts_is_refused() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.tokens(ids)).flatten(0, 1), labels.flatten())

    with pytest.raises(NothingSplitError, match="capacity_factor=1.5\\) has no experts to limit in this mod") as raised:
        split(Dense(), "dp=2", capacity_factor=1.5)
    assert "Way out: Plan(capacity_factor=None)" in str(raised.value) and str(raised.value).count("\n") < 15


def test_a_layer_that_stays_whole_says_that_it_drops_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Experts(12), Experts(12)

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            one, two = self.first(ids, labels), self.second(ids, labels)
            return {"loss": one["loss"] + two["loss"] + self.second.up.square().sum()}

    with pytest.warns(UserWarning, match="stay whole on ep, and drop nothing \\(capacity_factor=1.0\\): parameter"):
        split(Two(), "ep=2", capacity_factor=1.0)
