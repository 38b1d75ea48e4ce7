"""Piecewise DTensors against whole tensors: operators, views that are written to, gradients, optimizers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.tensor as tensor_package
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree as pytree

import autopar
from autopar import AutoparError, Mesh
from autopar.communication.connect import connect
from autopar.dtensors import piecewise
from autopar.dtensors.dtensor_habits import is_shown, take_over
from autopar.dtensors.piecewise import PiecewiseDTensor, cut_whole
from autopar.dtensors.placements import Pieces
from tests.against_one_process import GroupedHeads, float64, tiny_batch
from tests.launch import run_ranks

ORDER = Pieces(0, [(0, 4), (8, 2), (12, 2), (4, 4), (10, 2), (14, 2)])  # rank 0: rows 0-3 of q, 8-9 of k, 12-13 of v
Case = Callable[[Any, Any], Any]  # of two tensors [16,6], piecewise or whole


def written(a: Any, b: Any) -> Any:
    a[3] = 7.0
    a[5:9, 1].zero_()
    a.view(-1)[0] = 3
    a[2][1].add_(5)
    row = a[10]
    a.mul_(2)
    row.add_(1)
    a.t()[0].fill_(9)
    a[torch.tensor([1, 2])] = 4
    a.index_fill_(0, torch.tensor([3]), 1.0)
    return a.copy_(a + b)


def reloaded(a: Any, b: Any) -> Any:
    file = io.BytesIO()
    torch.save(a, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def gradients(loss: Case) -> Case:
    def found(a: Any, b: Any) -> Any:
        a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
        loss(a, b).backward()
        return [a.grad, b.grad]

    return found


def full(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def stepped(optimizer_of: Callable[..., Any], **clipping: Any) -> Case:
    def found(a: Any, b: Any) -> Any:
        plain = a.detach()[:, :3].clone()
        held = [nn.Parameter(tensor.detach().clone()) for tensor in (a, plain, b)]
        optimizer = optimizer_of(held)
        for _ in range(2):
            for number, parameter in enumerate(held):
                parameter.grad = (parameter.detach() * (number + 2)).sin()
            norm = torch.nn.utils.clip_grad_norm_(held, 0.5, **clipping)
            optimizer.step()
        states = [value for p in held for key, value in sorted(optimizer.state[p].items()) if key != "step"]
        return [norm, *states, *held]

    return found


STAY: dict[str, Case] = {  # what is piecewise afterwards
    "add": lambda a, b: a + b * 2,
    "where": lambda a, b: torch.where(a > b, a, b).nan_to_num(),
    "compare": lambda a, b: a > 0,
    "cast": lambda a, b: a.to(torch.float32),
    "zeros": lambda a, b: torch.zeros_like(a),
    "new": lambda a, b: a.new_zeros(16, 6),
    "same view": lambda a, b: a.view_as(b),
    "copy": lambda a, b: copy.deepcopy(nn.Parameter(a)).detach(),
    "list": lambda a, b: torch._foreach_add([a, b], [b, a], alpha=2),
    "saved": reloaded,
    "gradient": gradients(lambda a, b: (a * b).sin().square().sum()),
    "gradient of the whole": gradients(lambda a, b: (full(a) * torch.arange(16.0)[:, None] * full(b)).sum()),
    "written": lambda a, b: written(a.clone(), b),
}
OTHERS: dict[str, Case] = {
    "norm": lambda a, b: [a.norm(), torch.linalg.vector_norm(a, 1), a.norm(dim=0), *torch._foreach_norm([a, b])],
    "sums": lambda a, b: [a.sum(), a.sum(0), a.sum(1), a.mean(), a.max(), a.std(), a.isnan().any()],
    "numbers": lambda a, b: [a.max().item(), torch.equal(a, a), torch.tensor(a.tolist()), torch.tensor(a.numpy())],
    "product": lambda a, b: a @ b.t(),
    "views": lambda a, b: [a.view(-1), a[5], a[3:11, 1:], a.t(), *a.split([8, 4, 4]), *a.chunk(2, 1)],
    "order": lambda a, b: [torch.cat([a, b]), a.cumsum(0), a.sort(0), a.topk(2, 0), a.argmax(), a.argmax(0)],
    "by rows": lambda a, b: a * torch.arange(16.0)[:, None] if type(a) is Tensor else a * rows(a),
    "gradient of a product": gradients(lambda a, b: (a @ b.t()).sin().sum()),
    "gradient of rows": gradients(lambda a, b: (a[3:9] * b[2:8]).sin().sum()),
    "written by a piecewise one": lambda a, b: everywhere(a).add_(b),
    "sgd": stepped(lambda held: torch.optim.SGD(held, 0.1, momentum=0.9)),
    "adamw": stepped(torch.optim.AdamW),
    "adamw of lists": stepped(lambda held: torch.optim.AdamW(held, foreach=True), foreach=True),
    "adam in one": stepped(lambda held: torch.optim.Adam(held, fused=True)),
    "muon": stepped(torch.optim.Muon),
}


def everywhere(tensor: Any) -> Any:
    return tensor.redistribute() if isinstance(tensor, DTensor) else tensor.clone()


def rows(like: DTensor) -> DTensor:
    """0, 1, 2, ... as a column that is split by neighbours."""
    return tensor_package.distribute_tensor(torch.arange(16.0)[:, None], like.device_mesh, [Shard(0)])


def same(found: Any, wanted: Any) -> bool:
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
    return all(full(x).shape == y.shape and torch.allclose(full(x), y, atol=1e-13) if type(y) is Tensor else x == y
               for x, y in pairs)  # fmt: skip


def compute_each() -> dict[str, bool]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    mesh = connect(Mesh(tp=2), 60.0, torch.device("cpu")).device_mesh
    take_over(mesh)
    wholes = [torch.randn(16, 6), torch.randn(16, 6)]
    found = {}
    for name, case in (STAY | OTHERS).items():
        held = [cut_whole(tensor, mesh, [ORDER]) for tensor in wholes]
        ours, theirs = case(*held), case(*(tensor.clone() for tensor in wholes))
        theirs = pytree.tree_map_only(nn.Parameter, lambda tensor: tensor.detach(), theirs)
        found[name] = same(ours, theirs)
        if name in STAY:
            found[f"{name} stays"] = type(pytree.tree_leaves(ours)[0]) is PiecewiseDTensor
    held, whole = cut_whole(wholes[0], mesh, [ORDER]), wholes[0]
    columns = held.redistribute(placements=[Shard(1)])
    for name, made in {
        "columns": columns,
        "back": columns.redistribute(placements=held.placements),
        "everywhere": held.redistribute(placements=[Replicate()]),
        "from local": DTensor.from_local(held.to_local(), mesh, held.placements),
        "distributed": tensor_package.distribute_tensor(whole, mesh, held.placements),
    }.items():
        found[name] = torch.equal(made.full_tensor(), whole)
        found[f"{name} is of its kind"] = (type(made) is PiecewiseDTensor) == (made.placements == held.placements)
    return found


def test_every_operator_on_two_processes() -> None:
    for found in run_ranks(compute_each, 2):
        assert all(found.values()), [name for name, right in found.items() if not right]


def shown_by_each_kind() -> list[bool]:
    """Whether ``to_local()`` of each parameter is remembered of it."""
    parallel = autopar.parallelize(float64(GroupedHeads), Mesh(tp=2), example_inputs=tiny_batch())
    found = []
    for parameter in parallel.parameters():
        before = is_shown(parameter)
        parameter.to_local()
        found.append(not before and is_shown(parameter))
    assert {type(parameter) for parameter in parallel.parameters()} == {DTensor, PiecewiseDTensor}
    return found


def test_parts_that_were_shown_are_remembered() -> None:
    assert all(run_ranks(shown_by_each_kind, 2)[0])


def called_by_name() -> list[bool]:
    """As torch's own loss_parallel calls them, and scripts beside autopar."""
    mesh = autopar.parallelize(nn.Linear(4, 4), Mesh(dp=1)).weight.device_mesh
    x, everywhere = torch.randn(4, 4), [Replicate()] * mesh.ndim
    made = DTensor.from_local(local_tensor=x, device_mesh=mesh, placements=everywhere, run_check=False)
    again = made.redistribute(device_mesh=mesh, placements=everywhere, async_op=False)
    spread = tensor_package.distribute_tensor(tensor=x, device_mesh=mesh, placements=everywhere)
    return [torch.equal(one.full_tensor(), x) for one in (made, again, spread)]


def test_functions_of_torch_keep_the_names_of_their_arguments() -> None:
    assert run_ranks(called_by_name, 1) == [[True] * 3]


def test_torch_that_has_no_such_tensors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        device_mesh = "DeviceMesh((tp=2))"

        def detach(self) -> Tensor:
            """As in torch 2.11, where no operator of a class of its own runs."""
            return torch.ones(1)

    monkeypatch.setattr(piecewise, "_checked", set())
    for _ in range(2):
        with pytest.raises(AutoparError, match=r"is split over DeviceMesh\(\(tp=2\)\), and torch .* has no DTensors"):
            piecewise._check_torch(Plain())  # type: ignore[arg-type]
