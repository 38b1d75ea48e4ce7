"""The loss of a microbatch as a summand of that of the batch: losses that people have, and those that have no parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autopar
from autopar import InvariantError, Mesh, Plan
from autopar.check import Reference, check
from autopar.compiler import compile_program, split_program
from autopar.errors import TraceError
from autopar.ir.program import Program
from autopar.proof.verify import verify
from autopar.simulate import simulate
from tests.against_one_process import difference, whole
from tests.selection import slow_but

Loss = Callable[["Labels", Tensor, Tensor], Tensor]


class Labels(nn.Module):
    """A classifier of 7 classes whose loss is ``loss(self, scores, labels)``; the second row has no label."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.up, self.down, self.loss = nn.Linear(5, 6), nn.Linear(6, 7), loss
        self.register_buffer("weight", torch.arange(1.0, 8.0) / 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.down(torch.tanh(self.up(x)))
        return {"loss": self.loss(self, scores.flatten(0, 1), labels.flatten())}


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels.clamp(min=0), 7).double()


def masked(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels, reduction="none", ignore_index=-100)


LOSSES: dict[str, Loss] = {
    "cross entropy": lambda m, s, y: F.cross_entropy(s, y),
    "smoothed, weighted": lambda m, s, y: F.cross_entropy(s, y, weight=m.weight, label_smoothing=0.1),
    "nll": lambda m, s, y: F.nll_loss(s.log_softmax(-1), y),
    "nll, weighted": lambda m, s, y: F.nll_loss(s.log_softmax(-1), y, weight=m.weight),
    "bce": lambda m, s, y: F.binary_cross_entropy(s.sigmoid(), one_hot(y)),
    "bce with logits": lambda m, s, y: F.binary_cross_entropy_with_logits(s, one_hot(y), pos_weight=m.weight),
    "smooth l1": lambda m, s, y: F.smooth_l1_loss(s, one_hot(y)),
    "huber": lambda m, s, y: F.huber_loss(s, one_hot(y), delta=0.3),
    "kl batchmean": lambda m, s, y: F.kl_div(s.log_softmax(-1), one_hot(y), reduction="batchmean"),
    "sum of means": lambda m, s, y: F.mse_loss(s, one_hot(y)) + 0.1 * s.abs().mean(),
    "z loss": lambda m, s, y: F.cross_entropy(s, y) + 1e-2 * s.logsumexp(-1).square().mean(),
    "scaled": lambda m, s, y: 0.5 * F.cross_entropy(s, y) / 3,
    "over a clamped count": lambda m, s, y: masked(s, y).sum() / (y >= 0).sum().clamp(min=1),
    "over a count and a half": lambda m, s, y: masked(s, y).sum() / ((y >= 0).sum() + 0.5),
    "over the root of a count": lambda m, s, y: masked(s, y).sum() / (y >= 0).sum().sqrt(),
    "rows over a count": lambda m, s, y: (masked(s, y) * (y >= 0) / (y >= 0).sum()).sum(),
    "over the batch size": lambda m, s, y: F.cross_entropy(s, y, reduction="sum") / len(y),
    "over a number": lambda m, s, y: F.cross_entropy(s, y, reduction="sum") / 11.0,
    "with decay": lambda m, s, y: F.cross_entropy(s, y) + 0.01 * m.up.weight.square().sum(),
    "mean over dims": lambda m, s, y: s.square().mean(0).sum(),
    "list of terms": lambda m, s, y: torch.stack([F.cross_entropy(s, y), s.square().mean()]).sum(),
    "two counts": lambda m, s, y: masked(s, y).sum() / (y >= 0).sum() - 0.1 * (s * m.weight).sum() / (y > 2).sum(),
}  # fmt: skip
NO_PARTS: dict[str, tuple[Loss, str]] = {
    "norm": (lambda m, s, y: s.norm(), "aten.linalg_vector_norm"),
    "in-batch negatives": (lambda m, s, y: F.cross_entropy(s @ s.t(), torch.arange(len(s))), "aten.matmul"),
    "product of means": (lambda m, s, y: (s.mean(0) * s.sigmoid().mean(0)).sum(), "aten.mul.Tensor"),
    "largest": (lambda m, s, y: s.amax(), "aten.amax"),
    "root of a mean": (lambda m, s, y: F.mse_loss(s, one_hot(y)).sqrt(), "aten.sqrt"),
    "times the batch size": (lambda m, s, y: s.mean() * len(y), "a number that depends on the batch"),
    "spread over the batch": (lambda m, s, y: (s - s.mean(0)).square().mean(), "aten.sub.Tensor"),
}


def batch(rows: int = 8) -> dict[str, Tensor]:
    labels = torch.randint(7, (rows, 3))
    labels[1], labels[3, :2] = -100, -100
    return {"x": torch.randn(rows, 3, 5, dtype=torch.float64), "labels": labels}


def model(loss: Loss) -> Labels:
    torch.manual_seed(3)
    return Labels(loss).double()


@pytest.mark.parametrize("name", slow_but([0, 4, 8, 13, 16, 21], list(LOSSES)))
def test_losses_that_people_have(name: str) -> None:
    """Microbatches of four rows, of unequally many rows, of one row, one of these without a label."""
    reference = Reference(model(LOSSES[name]), batch())
    for sizes, count in (({"pp": 2}, 2), ({"pp": 2}, 3), ({"pp": 2}, 8), ({"pp": 2, "dp": 2}, 2)):
        report = reference.check(Mesh(**sizes), Plan(microbatches=count))
        assert report.worst < 1e-12, (sizes, count)


@pytest.mark.parametrize("name", slow_but([0, 1, 5], list(NO_PARTS)))
def test_losses_without_parts_are_refused_while_compiling(name: str) -> None:
    loss, said = NO_PARTS[name]
    for mesh, count in ((Mesh(pp=2), 2), (Mesh(pp=2), 8), (Mesh(dp=1), 2)):
        with pytest.raises(InvariantError, match=said) as caught:
            compile_program(model(loss), mesh, Plan(microbatches=count, check_numerics=False), (), batch())
        assert 'microbatch_weights="rows"' in str(caught.value) and "test_weigh_microbatches.py" in str(caught.value)


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(torch.tanh(self.up(x)))
        return {
            "loss": y.square().mean(), "accuracy": (y > 0).double().mean(), "total": y.sum(), "hits": (y > 0).sum(),
            "pooled": y.mean(0), "turned": y.transpose(0, 1), "rows": y, "weight": self.up.weight.square().sum(),
            "flat": y.flatten(),
        }  # fmt: skip


@pytest.mark.parametrize("count", [2, 3, 6])
def test_other_outputs_are_those_of_the_batch(count: int) -> None:
    torch.manual_seed(0)
    whole, x = Outputs().double(), torch.randn(6, 3, 6, dtype=torch.float64)
    program = compile_program(whole, Mesh(pp=2), Plan(microbatches=count), (), {"x": x})
    found = simulate(program, dict(whole.state_dict()), (), {"x": x}).output
    for name, wanted in whole(x).items():
        assert found[name].shape == wanted.shape and torch.allclose(found[name], wanted, atol=1e-13), name


class Largest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(self.up(x))
        return {"loss": y.mean(), "largest": y.amax()}


def test_an_output_that_parts_do_not_tell() -> None:
    whole, x = Largest().double(), torch.randn(4, 6, dtype=torch.float64)
    program = compile_program(whole, Mesh(pp=2), Plan(microbatches=2), (), {"x": x})
    with pytest.raises(InvariantError, match=r"output 'largest' is made of all rows of the batch at once"):
        simulate(program, dict(whole.state_dict()), (), {"x": x})
    found = simulate(program, dict(whole.state_dict()), (), {"x": x}, untold=True).output
    assert "'largest' is made of all rows of the batch at once" in str(found["largest"])
    torch.testing.assert_close(found["loss"], whole(x)["loss"], atol=1e-13, rtol=0)
    with pytest.warns(UserWarning, match="not compared: output 'largest'"):
        report = check(whole, {"x": x}, Mesh(pp=2), Plan(microbatches=2))
    assert report.passed and set(report.outputs) == {"['loss']"}


@pytest.mark.parametrize("mesh", slow_but([0], [Mesh(pp=2), Mesh(dp=2)]), ids=str)
def test_they_do_not_stand_in_the_way_of_a_proof(mesh: Mesh) -> None:
    torch.manual_seed(0)
    found = verify(Largest(), mesh, Plan(microbatches=2), example_inputs={"x": torch.randn(8, 6)}, layers=["field"])
    assert found.proved, str(found)


def test_counts_look_at_labels_alone() -> None:
    plan = Plan(microbatches=2)
    program = split_program(
        model(LOSSES["smoothed, weighted"]), Mesh(dp=1), plan, (), batch(), after="weigh_microbatches"
    )
    assert isinstance(program, Program) and program.counts is not None
    assert not any("linear" in node.name for node in program.counts.graph.nodes)
    again = split_program(model(LOSSES["cross entropy"]), Mesh(dp=1), Plan(), (), batch(), after="weigh_microbatches")
    assert not again.is_weighed and again.counts is None, "one part: nothing to weigh"


POSITIONS: dict[str, Loss] = {
    "numbers in turn": lambda m, s, y: (s * torch.arange(len(s))[:, None]).mean(),
    "a parameter for each half": lambda m, s, y: (s.unflatten(0, (2, -1)) * m.up.weight[:2, :1, None]).mean(),
    "a buffer for each half": lambda m, s, y: (s.unflatten(0, (2, -1)) * m.weight[:2, None, None]).mean(),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_a_table_of_the_batch_is_no_part_of_it(name: str) -> None:
    """Of what has a line for each row of the batch, every microbatch would take the first lines."""
    with pytest.raises(
        InvariantError, match=r"aten\.\w+\.\w+ at test_weigh_microbatches.py.*computed of all rows at once"
    ):
        compile_program(model(POSITIONS[name]), Mesh(pp=2), Plan(microbatches=2), (), batch())


def test_a_row_picks_its_own() -> None:
    def loss(m: Any, s: Tensor, y: Tensor) -> Tensor:
        return -s.log_softmax(-1)[torch.arange(len(s)), y.clamp(min=0)].mean()

    assert Reference(model(loss), batch()).check(Mesh(pp=2), Plan(microbatches=2)).worst < 1e-12


class Bag(nn.Module):
    """Indexes rows of the batch by constants, which a microbatch does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.order = nn.Linear(5, 4), torch.tensor([1, 0])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        return (y + y[self.order]).mean()


def test_rows_that_a_microbatch_does_not_have() -> None:
    with pytest.raises(TraceError, match="index.* out of"):
        compile_program(Bag().double(), Mesh(pp=2), Plan(microbatches=2), (), {"x": torch.randn(2, 5).double()})


class Tables(nn.Module):
    """``offsets`` [tables, rows] has its rows in the second dim."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(9, 4), nn.Linear(4, 1)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        return (self.top(self.table(ids).sum(0)) * dense).mean()


def test_a_batch_dim_that_is_guessed_wrongly() -> None:
    given = {"dense": torch.randn(4, 1, dtype=torch.float64), "ids": torch.randint(9, (3, 4))}
    with pytest.raises(TraceError, match=r"(?s)ids \[3, 4\] of \[3, 4\].*Plan\(batch_dims="):
        compile_program(Tables().double(), Mesh(pp=2), Plan(microbatches=2), (), given)
    report = Reference(Tables().double(), given).check(Mesh(pp=2), Plan(microbatches=2, batch_dims={"ids": 1}))
    assert report.worst < 1e-12


def spread(scores: Tensor, labels: Tensor) -> Tensor:
    """A statistic of a router's kind: means over the labelled rows, multiplied; one of them is divided by hand."""
    chances, kept = scores.softmax(-1), (labels >= 0).double()[:, None]
    used = F.one_hot(chances.argmax(-1), 7).double().mean(0)
    return (used * (chances * kept).sum(0)).sum() / kept.sum().clamp(min=1) + chances.sum(0).square().sum() / len(
        scores
    ) ** 2


STATISTICS: dict[str, tuple[Loss, Loss]] = {  # sums over the batch, and what is added of each microbatch
    "a router's": (lambda m, s, y: F.cross_entropy(s, y), lambda m, s, y: 0.3 * spread(s, y)),
    "two of them": (lambda m, s, y: s.square().mean(), lambda m, s, y: -spread(s, y) + s.norm() / 3),
}


@pytest.mark.parametrize("name", ["a router's", pytest.param("two of them", marks=pytest.mark.slow)])
def test_statistics_of_each_microbatch(name: str) -> None:
    """The sums are those of the whole batch, also where microbatches have unequally many labels, or rows."""
    summed, mixed = STATISTICS[name]
    whole, given = model(lambda m, s, y: summed(m, s, y) + mixed(m, s, y)), batch()
    for sizes, count in (({"pp": 2}, 8), ({"pp": 2}, 3), ({"pp": 2, "dp": 2}, 2)):
        plan = Plan(microbatches=count, microbatch_weights="statistics")
        program = compile_program(whole, Mesh(**sizes), plan, (), given)
        step = simulate(program, dict(whole.state_dict()), (), given)
        whole.loss = summed
        expected = whole(**given)["loss"]
        whole.loss = mixed
        rows = [len(part) for part in torch.tensor_split(given["x"], count)]
        for x, labels, n in zip(given["x"].split(rows), given["labels"].split(rows), rows):
            expected = expected + whole(x, labels)["loss"] * n / 8
        whole.loss = lambda m, s, y: summed(m, s, y) + mixed(m, s, y)
        gradients = torch.autograd.grad(expected, list(whole.parameters()))
        assert step.loss is not None and torch.allclose(step.loss, expected, rtol=0, atol=1e-13), (sizes, count)
        for (key, _), gradient in zip(whole.named_parameters(), gradients):
            assert torch.allclose(step.grads[key], gradient, rtol=0, atol=1e-13), (sizes, count, key)
    assert Reference(whole, given).check(Mesh(pp=2), plan).worst < 1e-12


def test_a_mean_is_of_the_batch_or_of_the_microbatch() -> None:
    def shared(m: Labels, s: Tensor, y: Tensor) -> Tensor:
        mean = s.square().mean()
        return mean + mean.sqrt()

    plan = Plan(microbatches=2, microbatch_weights="statistics", check_numerics=False)
    with pytest.raises(InvariantError, match=r"(?s)aten.mean.default at test_weigh.*cannot be both.*Way out"):
        compile_program(model(shared), Mesh(pp=2), plan, (), batch())


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x)).square().mean()  # type: ignore[no-any-return]


def test_statistics_of_the_batch_on_one_rank() -> None:
    """Accumulated on one rank, as on a pipeline: no microbatch has the statistics of the batch."""
    norm, given = Normalised().double(), {"x": torch.randn(8, 5, dtype=torch.float64)}
    for mesh in (Mesh(dp=1), Mesh(dp=2), Mesh(pp=2)):
        with pytest.raises(InvariantError, match="'norm' normalise by statistics of the batch; each of 2 microbatches"):
            compile_program(norm, mesh, Plan(microbatches=2), (), given)
        compile_program(norm, mesh, Plan(microbatches=2, microbatch_weights="statistics"), (), given)
        compile_program(norm, mesh, Plan(), (), given)
    norm.eval()
    assert Reference(norm, given).check(Mesh(pp=2), Plan(microbatches=2)).worst < 1e-12


class Centred(nn.Module):
    """Takes the mean of an input over the batch away from it, before anything is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x - x.mean(0, keepdim=True)).square().mean()  # type: ignore[no-any-return]


def test_a_mean_of_the_inputs_over_the_batch() -> None:
    """Each microbatch is a share of it: unequal ones, on one rank and on a pipeline."""
    given = {"x": torch.randn(7, 5, dtype=torch.float64)}
    reference = Reference(Centred().double(), given)
    for count in (2, 3):
        assert reference.check(Mesh(pp=2), Plan(microbatches=count)).worst < 1e-12
    model = Centred().double()
    expected = copy.deepcopy(model)
    parallel = autopar.parallelize(model, Mesh(dp=1), Plan(microbatches=3))
    loss, wanted = parallel.train_step(**given), expected(**given)
    wanted.backward()
    assert difference(loss, wanted.detach()) < 1e-12
    for found, own in zip(parallel.parameters(), expected.parameters()):
        assert difference(whole(found.grad), own.grad) < 1e-12
