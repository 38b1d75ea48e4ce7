"""Expert parallelism as users write it by hand: Hugging Face's model with its experts replaced, inside DDP.

torchtitan's scheme (its ``MoE`` and ``ExpertParallel``; Rajbhandari et al. 2022) in plain torch: each rank has an n-th
of the experts and of the batch. Rows are sorted by expert, their numbers exchanged, the rows sent by an
uneven all-to-all, sorted by local expert, multiplied expert after expert, and sent back the same way; the weighted sum
is in the order of the tokens. DDP sums the gradients of all else; those of the experts are complete on their rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders import Contender, loss_of
from benchmarks.subjects import Batch

FORWARD_AND_BACKWARD = 2


class HandWritten(Contender):
    """``model`` with each ``MixtralExperts`` replaced; collective. The batch is split by rows."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.layers = [_replace(model, name) for name in _names_of_experts(model)]
        own = [name for name, _ in model.named_parameters() if ".experts." in name]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
        whole = DistributedDataParallel(model, broadcast_buffers=False)
        whole.register_comm_hook(None, lambda _, bucket: _summed(bucket.buffer()))  # type: ignore[no-untyped-call]
        self.reduced = sum(p.nbytes for name, p in model.named_parameters() if name not in own)
        super().__init__(whole, fused)

    def part(self, batch: Batch) -> Batch:
        return {name: rows.chunk(self.ranks)[self.rank] for name, rows in batch.items()}

    def forward(self, batch: Batch) -> Tensor:
        return loss_of(self.module(**batch)) / self.ranks

    def whole_loss(self, loss: Tensor) -> float:
        dist.all_reduce(loss)
        return float(loss)

    def sent(self) -> int:
        """Bytes that this rank sends in a step, on the mean of the steps until now."""
        reduced = 2 * self.reduced * (self.ranks - 1) // self.ranks
        return reduced + FORWARD_AND_BACKWARD * sum(layer.left // layer.calls for layer in self.layers)


def _summed(bucket: Tensor) -> torch.futures.Future[Tensor]:
    """Over the ranks, where DDP by itself takes the mean: the gradients of experts are sums."""
    work = dist.all_reduce(bucket, async_op=True)
    assert work is not None
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda found: found.value()[0])
    return summed


def _names_of_experts(model: nn.Module) -> Iterator[str]:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    yield from [name for name, module in model.named_modules() if isinstance(module, MixtralExperts)]


def _replace(model: nn.Module, name: str) -> Experts:
    parent, _, last = name.rpartition(".")
    found = Experts(model.get_submodule(name))
    setattr(model.get_submodule(parent), last, found)
    return found


# ---------------------------------------------------------------- the layer


class Experts(nn.Module):
    """The experts of this rank: ``gate_up_proj`` (E / n, 2 I, H), ``down_proj`` (E / n, H, I)."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.ranks, rank = dist.get_world_size(), dist.get_rank()
        self.experts: int = whole.num_experts
        self.activation: Callable[[Tensor], Tensor] = whole.act_fn
        for name in ("gate_up_proj", "down_proj"):
            own = getattr(whole, name).detach().chunk(self.ranks)[rank]
            self.register_parameter(name, nn.Parameter(own.clone()))
        self.left, self.calls = 0, 0  # bytes that have left this rank in forward

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """tokens (T, H), chosen and weights (T, k) -> (T, H)."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.experts).view(self.ranks, -1)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        sent, arriving = counts.sum(1).tolist(), received.sum(1).tolist()
        rows = _exchanged(tokens[order // chosen.shape[1]], arriving, sent)
        rows = _exchanged(self._products(rows, received), sent, arriving)
        self._count(tokens, sent, arriving)
        home = torch.empty_like(rows).index_copy(0, order, rows)
        return torch.bmm(weights.unsqueeze(1).to(home.dtype), home.view(*chosen.shape, -1)).squeeze(1)

    def _products(self, rows: Tensor, received: Tensor) -> Tensor:
        """Of rows (R, H) that came rank by rank, expert by expert: ``received`` (n, E / n) of each."""
        ids = torch.arange(received.shape[1]).repeat(self.ranks).repeat_interleave(received.flatten())
        order = ids.argsort(stable=True)
        groups = rows[order].split(received.sum(0).tolist())
        found = torch.cat([self._product(group, expert) for expert, group in enumerate(groups)])
        return torch.empty_like(found).index_copy(0, order, found)

    def _product(self, rows: Tensor, expert: int) -> Tensor:
        gate, up = functional.linear(rows, self.gate_up_proj[expert]).chunk(2, -1)
        return functional.linear(self.activation(gate) * up, self.down_proj[expert])

    def _count(self, tokens: Tensor, sent: list[int], arriving: list[int]) -> None:
        rank = dist.get_rank()
        rows = sum(sent) - sent[rank] + sum(arriving) - arriving[rank]
        self.left += rows * tokens.shape[1] * tokens.itemsize
        self.calls += 1


def _exchanged(rows: Tensor, arriving: list[int], sent: list[int]) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    found = functional_collectives.all_to_all_single_autograd(rows, arriving, sent, group)
    waited: Tensor = functional_collectives.wait_tensor(found)  # type: ignore[no-untyped-call]
    return waited
