"""Expert parallelism: exact on every axis, with few exchanges, experts dealt out, and what is refused."""

from __future__ import annotations

import re
import warnings
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.analysis.footprint import held
from autopar.check import Reference, Report
from autopar.compiler import compile_program, split_program
from autopar.errors import IndivisibleError, NothingSplitError
from autopar.ir.node import value
from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.precision import Precision
from autopar.simulator.parts import Step
from tests.selection import one_each, slow_but

EXACT, TINY = 1e-12, 1e-10  # of all tokens alike, gradients are tiny in places
EXCHANGES = ("dispatch_rows", "return_rows")
WIDTH, INNER = 16, 12


class Experts(nn.Module):
    """Sorted rows and grouped products, as transformers has them, behind a router with an auxiliary loss."""

    def __init__(self, experts: int, biased: bool = False, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = experts
        self.tokens = nn.Embedding(32, WIDTH)
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * INNER, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(experts, WIDTH, INNER) / 4)
        self.bias = nn.Parameter(torch.randn(experts, WIDTH) / 4) if biased else None
        self.shared = nn.Linear(WIDTH, WIDTH) if shared else None
        self.head = nn.Linear(WIDTH, 32)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.tokens(ids)
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).softmax(-1)
        weights, chosen = scores.topk(2, -1)
        y = self._routed(rows, chosen) * weights.reshape(-1, 1)
        y = y.reshape(len(rows), 2, WIDTH).sum(1).reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        logits = self.head(x + y)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        share = nn.functional.one_hot(chosen, self.experts).to(scores.dtype).mean((0, 1))
        return {"loss": loss + 0.1 * (share * scores.mean(0)).sum(), "logits": logits}

    def _routed(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """One row of results for each choice of each token."""
        ids = chosen.reshape(-1)
        picked = rows.repeat_interleave(2, 0)
        gate, up = torch.bmm(self.up[ids], picked.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[ids], (torch.nn.functional.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias[ids]


def batch(rows: int = 12, kind: str = "usual") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32, (rows, 8), generator=generator)
    labels = ids.roll(-1, 1)
    for row in range(rows):
        labels[row, : row % 6] = -100  # unequal numbers of labels that count
    return {"ids": torch.full_like(ids, 5) if kind == "alike" else ids, "labels": labels}


@cache
def reference(experts: int, kind: str = "usual", **choices: bool) -> Reference:
    return Reference(Experts(experts, **choices), batch(kind=kind))


def checked(report: Report, limit: float = EXACT) -> Report:
    assert report.worst <= limit, (report.worst, report.grads)
    return report


def exchanges(report: Report, phase: str) -> list[tuple[str, str, int]]:
    return [(t.axis, t.name, t.operations) for t in report.step.traffic if t.phase == phase and t.name in EXCHANGES]


@pytest.mark.parametrize(
    ("ways", "experts", "kind"),
    slow_but([0, 8, 11, 13, 16, 21, 24, 29], product([1, 2, 3, 4, 6], [12, 10, 3], ["usual", "alike"])),
)
def test_exact_for_any_number_of_ranks_and_experts(ways: int, experts: int, kind: str) -> None:
    """Uneven parts, ranks without an expert, and, where all tokens are alike, ranks without a row."""
    report = checked(reference(experts, kind).check(Mesh(ep=ways), Plan()), TINY if kind == "alike" else EXACT)
    expected = [("ep", name, 1) for name in EXCHANGES] if ways > 1 else []
    assert exchanges(report, "forward") == exchanges(report, "backward") == expected
    program = report.program
    assert isinstance(program, Program)
    own = -(-experts // ways)
    for node, entry in program.placeholders(InputKind.PARAMETER):
        if entry.target in ("up", "down"):
            assert value(node).layout.local_shape(program.mesh)[0] == own


AXES: list[tuple[str, dict[str, Any]]] = [
    ("dp=2,ep=3", {}), ("ep=2,tp=2", {}), ("dp=2,ep=2,tp=3", {}), ("pp=2,ep=2", {"microbatches": 3}),
    ("ep=2,sp=2", {"sequence_dims": {"ids": 1, "labels": 1}}), ("ep=2", {"recompute": "full"}),
    ("ep=3", {"microbatches": 2}), ("ep=2", {"overlap_mb": 0.0}),
]  # fmt: skip
KINDS: dict[str, dict[str, bool]] = {"plain": {}, "biased": {"biased": True}, "shared": {"shared": True}}


@pytest.mark.parametrize(
    ("mesh", "plan", "choices"),
    one_each(AXES, KINDS.values()),
    ids=[f"{mesh}-{plan}-{kind}" for (mesh, plan), kind in product(AXES, KINDS)],
)
def test_exact_with_every_other_axis(mesh: str, plan: dict[str, Any], choices: dict[str, bool]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of statistics of microbatches
        reference_ = Reference(NoAuxiliary(10, **choices), batch()) if "microbatches" in plan else None
        report = (reference_ or reference(10, **choices)).check(Mesh.parse(mesh), Plan(**plan))
    checked(report)
    times = plan.get("microbatches", 1) if "pp" in mesh else 1
    assert sum(count for *_, count in exchanges(report, "backward")) == 2 * times, "recomputation sends nothing again"


class NoAuxiliary(Experts):
    """Without the loss of the router, whose statistics are those of a microbatch."""

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = super().forward(ids, labels)["logits"]
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_bytes_are_those_of_the_rows_that_leave_a_rank() -> None:
    report = reference(12).check(Mesh(ep=2), Plan())
    model, given = Experts(12).double(), batch()
    rows = model.tokens(given["ids"]).reshape(-1, WIDTH)
    chosen = model.router(rows).topk(2, -1)[1].view(2, -1)  # of each rank
    leaving = max(int((chosen[0] >= 6).sum()), int((chosen[1] < 6).sum()))
    sent = {(t.phase, t.name): t.bytes for t in report.step.traffic if t.name in EXCHANGES}
    assert sent["forward", "dispatch_rows"] == sent["backward", "dispatch_rows"] == leaving * WIDTH * 8
    (counts,) = [t for t in report.step.traffic if t.name == "all_to_all"]
    assert (counts.phase, counts.operations, counts.bytes) == ("forward", 1, (6 + 1) * 8)


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_parameters_of_a_rank_are_those_shared_and_its_part_of_the_experts(ways: int) -> None:
    model = Experts(12)
    program = compile_program(model, Mesh(ep=ways), Plan(check_numerics=False), (), batch())
    assert isinstance(program, Program)
    routed = 4 * (model.up.numel() + model.down.numel())
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert held(program).rank == whole - routed + routed // ways


def test_gradients_are_reduced_once_over_the_ranks_that_share_the_parameter() -> None:
    report = reference(12).check(Mesh(dp=2, ep=2), Plan(bucket_mb=0))
    sent = {(t.axis, t.name): (t.operations, t.bytes) for t in report.step.traffic if t.phase == "backward"}
    model = Experts(12)
    routed = 8 * (model.up.numel() + model.down.numel()) // 2  # those of a rank
    shared = 8 * sum(p.numel() for name, p in model.named_parameters() if name not in ("up", "down"))
    assert sent["dp", "all_reduce"] == (2, 2 * routed // 2)
    assert sent["dp+ep", "all_reduce"] == (4, 2 * 3 * shared // 4)
    assert {axis for axis, name in sent if name == "all_reduce"} == {"dp", "dp+ep"}


FOLDED: list[tuple[str, str, dict[str, Any]]] = [
    ("ep=2,tp=2", "ep+tp", {}), ("ep=2,tp=2", "ep+tp", {"sequence": "megatron"}), ("tp=3", "tp", {}),
    ("dp=2,ep=3,tp=2", "ep+tp", {}), ("ep=2,sp=2", "ep+sp", {}), ("sp=2", "sp", {}),
    ("ep=2,sp=2,tp=2", "ep+sp+tp", {}), ("pp=2,ep=2,tp=2", "ep+tp", {"microbatches": 2}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "axes", "plan", "biased"),
    one_each(FOLDED, [False, True]),
    ids=[f"{m}-{len(p)}-{kind}" for (m, _, p), kind in product(FOLDED, ["plain", "biased"])],
)
def test_whole_experts_over_several_axes(mesh: str, axes: str, plan: dict[str, Any], biased: bool) -> None:
    """In place of a split inside experts: fewer rows are sent, and gradients of experts need no sum over the group."""
    dims = {"ids": 1, "labels": 1} if "sp" in mesh else {}
    on = Mesh.parse(mesh)
    given = Reference(NoAuxiliary(12, biased=biased), batch()) if on.is_pipelined else reference(12, biased=biased)
    report = checked(given.check(on, Plan(expert_axes=axes, sequence_dims=dims, **plan)))
    routed = {(t.axis, t.name): t.bytes for t in report.step.traffic if t.phase == "forward" and t.name in EXCHANGES}
    assert {axis for axis, _ in routed} == {axes}
    parts = [report.program] if isinstance(report.program, Program) else report.program.stages
    found = {
        entry.target: value(node).layout
        for part in parts
        for node, entry in part.placeholders(InputKind.PARAMETER)
        if entry.target in ("up", "down", "bias")
    }
    assert all(layout.groups == (axes,) for layout in found.values()), found
    assert len(found) == 2 + biased


def test_folded_over_tp_unless_that_is_not_possible_or_not_wanted() -> None:
    def axes(mesh: str, rows: int = 12, experts: int = 12, **plan: Any) -> set[str]:
        program = split(Experts(experts), mesh, batch(rows), **plan)
        return {str(node.args[1]) for node in program.graph.nodes if "dispatch_rows" in node.name}

    assert axes("ep=2,tp=2") == {"ep+tp"}
    assert axes("ep=2,tp=2", experts=6) == {"ep"}, "6 experts do not divide over 4 ranks"
    assert axes("ep=2,tp=2", expert_axes="ep") == {"ep"}
    assert axes("tp=2") == set()
    assert axes("ep=2,tp=3", rows=2, experts=12) == {"ep"}, "8 tokens of a rank do not divide by 3"
    with pytest.raises(IndivisibleError, match="tp=3, which does not divide the 8 of a rank"):
        axes("ep=2,tp=3", rows=2, expert_axes="ep+tp")


def test_what_is_gathered_is_the_weighted_sum() -> None:
    program = split(Experts(12), "ep=2,tp=2")
    (gather,) = [node for node in program.graph.nodes if "all_gather" in node.name and node.args[3] == 0]
    assert value(gather).layout.local_shape(program.mesh) == (12 * 8 // 2, WIDTH), "one row for each token, not two"


class WithDropout(Experts):
    def _routed(self, rows: Tensor, chosen: Tensor) -> Tensor:
        ids = chosen.reshape(-1)
        gate, up = torch.bmm(self.up[ids], rows.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = nn.functional.dropout(nn.functional.silu(gate) * up, 0.3, self.training)
        return torch.bmm(self.down[ids], y.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize(
    ("mesh", "plan"),
    slow_but(
        [1, 3], [("ep=2", {}), ("ep=3", {"recompute": "full"}), ("ep=2,tp=2", {}), ("ep=2,tp=2", {"expert_axes": "ep"})]
    ),
    ids=str,
)
def test_dropout_inside_experts_draws_the_same_masks(mesh: str, plan: dict[str, Any]) -> None:
    """Masks depend on the token, not on the rank that it is sent to; so they go with the rows."""

    def step(on: Mesh, choices: Plan) -> Step:
        return autopar.parallelize(WithDropout(12).double(), on, choices).simulate(**batch())

    ours, theirs = step(Mesh.parse(mesh), Plan(**plan)), step(Mesh(dp=2), Plan())
    assert torch.equal(ours.loss, theirs.loss) or abs(float(ours.loss - theirs.loss)) < EXACT
    for name, grad in theirs.grads.items():
        torch.testing.assert_close(ours.grads[name], grad, rtol=0, atol=EXACT)
    without = autopar.parallelize(WithDropout(12).double().eval(), Mesh(ep=2)).simulate(**batch())
    assert abs(float(without.loss - ours.loss)) > 1e-3, "it is on"


def test_inference_and_lower_precision() -> None:
    parallel = autopar.parallelize(Experts(12).double(), Mesh(ep=2))
    with torch.no_grad():
        step = parallel.simulate(**batch())
    expected = Experts(12).double()(**batch())
    torch.testing.assert_close(step.output["logits"], expected["logits"], rtol=0, atol=EXACT)
    assert [t.name for t in step.traffic if t.name in EXCHANGES] == list(EXCHANGES)
    half = [
        autopar.parallelize(Experts(12), on, Plan(precision=Precision(param="bfloat16"))).simulate(**batch()).loss
        for on in (Mesh(dp=2), Mesh(ep=2), Mesh(ep=2, tp=2))
    ]
    assert max(abs(float(loss - half[0])) for loss in half) <= 2 * torch.finfo(torch.bfloat16).eps * float(half[0])


def test_no_argument_says_how_many_rows_there_are() -> None:
    """Gradients of sums over columns, and of strided slices, have sizes among their arguments in torch."""

    class Odd(Experts):
        def _routed(self, rows: Tensor, chosen: Tensor) -> Tensor:
            ids = chosen.reshape(-1)
            y = torch.bmm(self.up[ids], rows.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1)
            gate, up = y[:, ::2], y[:, 1::2]
            y = gate * up - gate.mean(-1, keepdim=True) + up.view(-1, 3, INNER // 3).sum(1).repeat_interleave(3, 1)
            return torch.bmm(self.down[ids], y.unsqueeze(-1)).squeeze(-1)

    report = checked(Reference(Odd(10), batch()).check(Mesh(ep=3), Plan()))
    assert exchanges(report, "forward") == [("ep", name, 1) for name in EXCHANGES]
    text = str(report.program)
    assert re.search(r"f64\[\d+\?@ep,12\]", text) and "columns_backward" in text


# ---------------------------------------------------------------- refused


def split(model: nn.Module, mesh: str, given: dict[str, Tensor] | None = None, **plan: Any) -> Any:
    return split_program(model, Mesh.parse(mesh), Plan(check_numerics=False, **plan), (), given or batch())


def test_a_model_without_experts_is_refused() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.tokens(ids)).flatten(0, 1), labels.flatten())

    with pytest.raises(NothingSplitError, match="ep=2 has no experts to deal out in this model") as raised:
        split(Dense(), "ep=2")
    assert "Way out: a mesh without ep" in str(raised.value) and str(raised.value).count("\n") < 15


def test_a_batch_that_does_not_divide() -> None:
    """Copies of rows are sent to experts as rows are, and count nothing; the tokens of one row are shared out."""
    for mesh, rows in (("ep=3", 4), ("dp=2,ep=2", 5), ("ep=2", 1), ("ep=2,tp=2", 1)):
        report = Reference(Experts(12), batch(rows)).check(Mesh.parse(mesh), Plan())
        assert report.passed, report


def test_weights_that_are_used_elsewhere_too_stay_whole() -> None:
    class Tied(Experts):
        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            found = super().forward(ids, labels)
            return {**found, "loss": found["loss"] + self.down.square().sum()}

    with pytest.raises(NothingSplitError, match="is used by .* too, outside of the experts"):
        split(Tied(12), "ep=2")


def test_rows_that_are_mixed_between_products_are_no_region() -> None:
    class Mixed(Experts):
        def _routed(self, rows: Tensor, chosen: Tensor) -> Tensor:
            ids = chosen.reshape(-1)
            y = torch.bmm(self.up[ids], rows.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1)[:, :INNER]
            y = y - y.mean(0)
            return torch.bmm(self.down[ids], y.unsqueeze(-1)).squeeze(-1)

    with pytest.raises(NothingSplitError, match="adds up its rows|does not treat each row alone"):
        split(Mixed(12), "ep=2")


def test_an_operator_without_a_known_way_for_ragged_rows_leaves_them_whole() -> None:
    class Sorted(Experts):
        def _routed(self, rows: Tensor, chosen: Tensor) -> Tensor:
            ids = chosen.reshape(-1)
            y = torch.bmm(self.up[ids], rows.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1)[:, :INNER]
            return torch.bmm(self.down[ids], y.cumsum(-1).unsqueeze(-1)).squeeze(-1)

    with pytest.raises(NothingSplitError, match="aten.cumsum.default is not known to take a number of rows that"):
        split(Sorted(12), "ep=2")


def test_a_layer_that_stays_whole_is_warned_of() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Experts(12), Experts(12)

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            one, two = self.first(ids, labels), self.second(ids, labels)
            return {"loss": one["loss"] + two["loss"] + self.second.up.square().sum()}

    with pytest.warns(UserWarning, match="stay whole on ep: parameter 'second.up' is used by"):
        checked(Reference(Two(), batch()).check(Mesh(ep=2), Plan()))
