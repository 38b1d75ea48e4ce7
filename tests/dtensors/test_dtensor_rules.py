"""What scripts do with gradients, states and parameters in parts, even and uneven ones, against whole tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional

from autopar import Mesh
from autopar.communication.connect import connect
from autopar.dtensors.dtensor import full_of
from autopar.dtensors.dtensor_habits import take_over
from autopar.dtensors.piecewise import dtensor
from autopar.errors import InvariantError
from tests.launch import run_ranks
from tests.selection import slow_but

Case = Callable[[Any, Any], Any]  # of two tensors alike, in parts or whole


def views(a: Any, _: Any) -> Any:
    a[:2] = 0
    a[1] *= 2
    a[..., 1].add_(3)
    a[-1, :2].zero_()
    a.view(-1)[4] = 9
    a.flatten()[5:7].zero_()
    a.t()[2].mul_(5)
    a.unbind(0)[3].fill_(3)
    a.chunk(2)[1].mul_(2)
    a.narrow(1, 0, 2).sub_(1)
    a.reshape(-1)[:2].fill_(4)
    a.view(a.shape[0], 2, -1)[2, 1] = 6
    a.fill_diagonal_(7)
    return a


def unfinished(a: Any, b: Any) -> Any:
    scalar = torch.tensor(2.0, dtype=a.dtype)
    norms = [b.norm(dim=0).sum(), b.norm(dim=1).sum(), b.norm(dim=0).clamp_(min=0.4), b.norm().clamp_(max=1)]
    sums = [functional.relu(b.sum() - 0.01), functional.relu(b.sum(0) - 0.01), 1 - b.sum(), scalar - b.sum(1)]
    filled = [b.sum().fill_(1), b.sum(0).add_(1), (b.t() @ a).fill_(1), b.mean().sub_(1)]
    together = [torch.stack([b.sum(), b.mean(), b.max()]), torch.cat([b.sum(0), a.amax(0)])]
    total = nn.utils.get_total_norm([a, b])
    agc = torch.where(b.norm(dim=1, keepdim=True) < a.norm(dim=1, keepdim=True).clamp_(min=1e-3), a, b * 0.5)
    return [*norms, *sums, *filled, *together, total, agc]


def means(a: Any, b: Any) -> Any:
    marks = torch.sign(b)
    return [
        functional.mse_loss(a, b),
        functional.mse_loss(a, torch.zeros_like(a), reduction="sum"),
        functional.smooth_l1_loss(a, b),
        functional.huber_loss(a, b),
        functional.soft_margin_loss(a, marks),
        functional.binary_cross_entropy(a.sigmoid(), b.sigmoid()),
        functional.binary_cross_entropy_with_logits(a, b.sigmoid()),
        functional.cosine_embedding_loss(a, b, torch.ones_like(a[:, 0])),
    ]


def penalties(a: Any, b: Any) -> Any:
    a = a.detach().requires_grad_()
    loss = (
        torch.tensor(0.5, dtype=a.dtype) + functional.mse_loss(a, b) + a.norm(dim=0).sum() + functional.huber_loss(a, b)
    )
    labels = (b[:, 0].abs() * 100).long() % 3
    loss = loss + functional.cross_entropy(a, labels, ignore_index=0) + functional.embedding(labels, a).square().sum()
    loss = loss + (a.t() @ a).square().sum() + functional.relu(a.sum() - 0.01)
    full_of(loss).backward()
    return [loss, a.grad]


def extremes(a: Any, b: Any) -> Any:
    inf = float("inf")
    of_dims = [b.amax(0), b.amin(1), b.max(0).values, b.min(1).indices, b.abs().amax((0, 1)), b.argmax(0)]
    norms = [b.norm(inf), torch.linalg.vector_norm(b, -inf), b.norm(inf, dim=0), *torch._foreach_norm([a, b], inf)]
    return [b.max(), b.min(), b.abs().max(), *torch.aminmax(b), *of_dims, *norms, nn.utils.get_total_norm([a, b], inf)]


CASES: tuple[Case, ...] = (views, unfinished, means, penalties, extremes)


def differences(layouts: Layouts, sizes: dict[str, int]) -> dict[str, float]:
    mesh = connect(Mesh(**sizes), 30.0, torch.device("cpu")).device_mesh
    take_over(mesh)
    found = {}
    for placements, shape in layouts:
        for case in CASES:
            torch.manual_seed(0)
            wholes = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
            everywhere = [dtensor(one.clone(), mesh, [Replicate()] * mesh.ndim, shape) for one in wholes]
            parts = [one.redistribute(placements=placements) for one in everywhere]
            ours, theirs = case(*parts), case(*wholes)
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, list) else [(ours, theirs)]
            for place, (mine, expected) in enumerate(pairs):
                assert isinstance(mine, DTensor) and mine.shape == expected.shape, (case.__name__, place)
                error = float((full_of(mine) - expected).detach().abs().max())
                found[f"{case.__name__} {place} {placements} {shape}"] = error
    part = torch.ones(1, 6, dtype=torch.float64)  # as this rank's only row would be
    split = dtensor(part.clone(), mesh, [Shard(0)] * mesh.ndim, (mesh.size(), 6))
    whole = dtensor(part.clone(), mesh, [Replicate()] * mesh.ndim, (1, 6))
    for _ in range(2):  # what torch has heard of before it does not ask about again
        for operator in (torch.add, functional.mse_loss, torch.atan2):
            operator(split, whole.expand(mesh.size(), 6))
            with pytest.raises((InvariantError, RuntimeError), match="got mixed torch.Tensor and DTensor"):
                operator(split, part.expand(mesh.size(), 6))
    with pytest.raises(NotImplementedError):  # each rank would draw others
        torch.poisson(split)
    output = dtensor(torch.ones(2, 6), mesh, [Shard(0)] * mesh.ndim, (2 * mesh.size(), 6)).requires_grad_() * 2
    output[:, 1:3].mul_(3)  # of which each rank has its rows
    for written in (output[1], output[1:][:, 2]):
        assert written.sum().full_tensor() > 0
        with pytest.raises(InvariantError, match="writes to a slice of an output"):
            written.clamp_(max=0)
    return found


Layouts = list[tuple[list[Any], tuple[int, int]]]
UNEVEN: Layouts = [([Shard(0)], (7, 6))]
EVEN: Layouts = [([Shard(1)], (8, 6))]
FOUR: Layouts = [
    ([Shard(0), Shard(1)], (7, 6)), ([Shard(1), Shard(0)], (8, 6)), ([Replicate(), Shard(0)], (7, 6)),
    ([Replicate(), Replicate()], (7, 6)), ([Shard(0), Replicate()], (8, 6)),
]  # fmt: skip

EMPTY: Layouts = [([Shard(0)], (5, 6))]  # 2, 2, 1 and no row
RUNS = [({"dp": 2}, UNEVEN), ({"dp": 2}, EVEN), ({"dp": 2, "tp": 2}, FOUR), ({"dp": 4}, EMPTY)]


@pytest.mark.parametrize(("sizes", "layouts"), slow_but([0, 3], RUNS))
def test_numbers_of_whole_tensors(sizes: dict[str, int], layouts: Layouts) -> None:
    for found in run_ranks(differences, Mesh(**sizes).world_size, layouts, sizes):
        assert max(found.values()) < 1e-12, sorted(found.items(), key=lambda pair: -pair[1])[:5]
