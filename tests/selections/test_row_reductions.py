"""Sums, means and losses of rows that a condition selects: one program for any number of them, also for none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar import Mesh, Plan
from autopar.check import check
from tests.launch import run_ranks
from tests.observation.test_observation import compare

Loss = Callable[[nn.Linear, Tensor, Tensor, Tensor], Tensor]  # layer, its outputs (4, 6, 8), x (4, 6, 8), labels (4, 6)
IGNORED = -100


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = nn.Linear(8, 8), loss

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.layer, self.layer(x), x, labels)


def batch(labelled: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, 8, generator=generator)
    labels = torch.randint(0, 8, (4, 6), generator=generator)
    labels[torch.rand(4, 6, generator=generator) >= labelled] = IGNORED
    return {"x": x, "labels": labels}


def cross_entropies(layer: nn.Linear, h: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    mask, other = labels != IGNORED, torch.where(labels == IGNORED, -1, labels)
    loss = F.cross_entropy(h[labels != IGNORED], labels[labels != IGNORED], label_smoothing=0.1)
    loss = loss + F.cross_entropy(h[mask], labels[mask], weight=torch.arange(1.0, 9.0))
    loss = loss + F.cross_entropy(h[other >= 0], other[other >= 0], reduction="sum") / mask.sum()
    loss = loss + F.nll_loss(h[mask].log_softmax(-1), labels[mask])
    return loss + (F.cross_entropy(h[mask], labels[mask], reduction="none") * x[mask][:, 0]).mean()


def by_position(layer: nn.Linear, h: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    flat, places = h.view(-1, 8), (labels.view(-1) != IGNORED).nonzero().squeeze(-1)
    loss = F.cross_entropy(flat.index_select(0, places), labels.view(-1)[places])
    rows = flat[places]
    return loss + rows.square().sum() / rows.shape[0] + rows.sum() / (3 * rows.numel())


def statistics(layer: nn.Linear, h: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    rows = h[labels != IGNORED]
    one = torch.masked_select(h[..., 0], labels != IGNORED)
    total = rows.mean() + rows.mean(0).square().sum() + one.mean() + rows.var() + rows.std(0).sum()
    total = total + rows.norm() + rows.norm(dim=-1).sum() + rows.logsumexp(0).sum() + (rows.T @ rows).square().mean()
    return total + rows.square().mean(1).prod() + (one > 0).sum() * rows.sum()


def elementwise_losses(layer: nn.Linear, h: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    mask = labels != IGNORED
    rows, wanted = h[mask], x[mask]
    total = F.mse_loss(rows, wanted) + F.l1_loss(rows, wanted, reduction="sum") + F.huber_loss(rows, wanted)
    marks = (wanted > 0).to(rows.dtype)
    total = total + F.binary_cross_entropy_with_logits(rows, marks) + F.binary_cross_entropy(rows.sigmoid(), marks)
    return total + F.kl_div(rows.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")


def looked_up(layer: nn.Linear, h: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    mask = labels != IGNORED
    rows, ids = h[mask], labels[mask]
    total = (F.embedding(ids, layer.weight) * rows).sum() - rows.log_softmax(-1).gather(1, ids[:, None]).mean()
    segments = torch.zeros(8, 8).index_add(0, ids, rows)
    return total + segments.square().mean() + F.one_hot(ids, 8).sum(0).prod() * rows.sum()


def where_others_are_singular(layer: nn.Linear, h: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """As losses of depth: what is not selected has no logarithm, or no number at all."""
    depth = F.relu(x)
    valid = depth > 0
    difference = depth[valid].log() - h.square()[valid].log()
    total = difference.square().mean() - 0.5 * difference.mean() ** 2
    missing = torch.where(labels[..., None] == IGNORED, float("nan"), x)
    total = total + F.mse_loss(h[~torch.isnan(missing)], missing[~torch.isnan(missing)])
    above = x > 1
    total = total + (h[above] * torch.sqrt(x[above] - 1) / (x[above] - 1)).mean()
    out, mask = torch.zeros_like(h), labels > 3
    out[mask] = h[mask] / (labels[mask] - 3)[:, None] / h[mask].shape[0]
    return total + (out * x).sum()


SOME: list[Loss] = [cross_entropies, statistics, where_others_are_singular]
OTHERS: list[Loss] = [by_position, elementwise_losses, looked_up]


@pytest.mark.parametrize(
    "loss",
    [*SOME, *(pytest.param(loss, marks=pytest.mark.slow) for loss in OTHERS)],
    ids=lambda loss: loss.__name__,
)
def test_one_program_for_any_number(loss: Loss) -> None:
    model = Net(loss)
    parallel = autopar.parallelize(copy.deepcopy(model), Mesh(dp=2, tp=2))
    for call in (batch(0.5), batch(0.2, seed=1), batch(1.0, seed=2)):
        compare(parallel, model, *call.values())
    assert len(parallel._programs) == 1


@pytest.mark.parametrize("loss", [elementwise_losses], ids=lambda loss: loss.__name__)
def test_of_no_row(loss: Loss) -> None:
    """A mean of nothing is nan, as it is in torch, and its gradients are zeros."""
    model = Net(loss)
    step = autopar.parallelize(copy.deepcopy(model), Mesh(dp=2)).simulate(**batch(0.0))
    expected = model(**batch(0.0))
    assert torch.isnan(expected) and torch.isnan(step.loss)
    expected.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(step.grads[name], parameter.grad, equal_nan=True)


def test_with_microbatches() -> None:
    """How many rows are selected is counted over the whole batch."""
    assert check(Net(cross_entropy), batch(0.4), Mesh(pp=1), Plan(microbatches=2)).passed


def cross_entropy(layer: nn.Linear, h: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(h[labels != IGNORED], labels[labels != IGNORED])


def of_two() -> list[float]:
    torch.set_default_dtype(torch.float64)
    model = Net(cross_entropy)
    parallel = autopar.parallelize(copy.deepcopy(model), Mesh(dp=2))
    found = []
    for call in (batch(0.5), batch(0.2, seed=1)):
        loss, expected = parallel(**call), model(**call)
        (loss / 2).backward()
        (expected / 2).backward()
        found.append(float((loss - expected).abs()))
    gradient = parallel.layer.weight.grad.full_tensor()
    return [*found, float((gradient - model.layer.weight.grad).abs().max())]  # type: ignore[operator]


def test_on_two_processes() -> None:
    for found in run_ranks(of_two, 2):
        assert max(found) < 1e-12
