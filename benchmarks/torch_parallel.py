"""The peer: a model parallelised by hand with what torch itself has, DTensor tensor parallelism inside DDP.

The recipe is that of torch's tutorial "Large Scale Transformer model training with Tensor Parallel" for Llama:
``parallelize_module`` with column-wise q, k, v, gate, up and output projection, row-wise o, down and embedding,
``PrepareModuleInput`` where a block's hidden state enters them (so that its gradient is reduced once, not once per
layer), ``loss_parallel``, and with ``sequence`` the ``SequenceParallel`` norms of the same tutorial. Data parallelism
over the other mesh dim is ``DistributedDataParallel(module, device_mesh=mesh["dp"])``, which turns DTensor parameters
into local ones by itself, or ``replicate`` (the newer one, on FSDP's machinery), which keeps them. Sharded data
parallelism is DDP with ``ZeroRedundancyOptimizer`` (ZeRO-1) or ``fully_shard`` of each block and of the root (FSDP2),
which lets gathered parameters go after forward (ZeRO-3) or keeps them until backward is through.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders import RATE, Contender
from benchmarks.subjects import Batch, Sites, Subject

DATA_FORMS = ("ddp", "replicate", "zero_redundancy", "fully_shard", "fully_shard_kept")


class TorchParallel(Contender):
    """``model`` on ``mesh`` (dims dp and tp). ``data`` is one of ``DATA_FORMS``."""

    def __init__(
        self, subject: Subject, model: nn.Module, mesh: DeviceMesh, sequence: bool, data: str, fused: bool
    ) -> None:
        self.mesh, self.splits_tensors = mesh, mesh["tp"].size() > 1
        self.rank, self.ways = mesh["dp"].get_local_rank(), mesh["dp"].size()
        if self.splits_tensors:
            subject.localised(model)
            parallelize_module(model, mesh["tp"], tensor_plan(model, subject.sites, sequence))
        super().__init__(self._data_parallel(model, subject.sites, data) if self.ways > 1 else model, fused)
        if data == "zero_redundancy":
            self.optimizer = ZeroRedundancyOptimizer(self.module.parameters(), torch.optim.AdamW, lr=RATE, fused=fused)

    def _data_parallel(self, model: nn.Module, sites: Sites, data: str) -> nn.Module:
        mesh = self.mesh["dp"]
        if data in ("ddp", "zero_redundancy"):
            return DistributedDataParallel(model, device_mesh=mesh)
        forms: dict[str, Callable[[nn.Module], object]] = {
            "replicate": lambda module: replicate(module, mesh=mesh),
            "fully_shard": lambda module: fully_shard(module, mesh=mesh, reshard_after_forward=True),
            "fully_shard_kept": lambda module: fully_shard(module, mesh=mesh, reshard_after_forward=False),
        }
        for name in sites.block_names(model):
            forms[data](model.get_submodule(name))
        forms[data](model)  # in place
        return model

    def part(self, batch: Batch) -> Batch:
        return {name: whole.chunk(self.ways)[self.rank].contiguous() for name, whole in batch.items()}

    def forward(self, batch: Batch) -> Tensor:
        with self._split_loss():
            return super().forward(batch)

    def backward(self, loss: Tensor) -> None:
        with self._split_loss():
            super().backward(loss)

    def _split_loss(self) -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = loss_parallel() if self.splits_tensors else nullcontext()
        return found

    def whole_loss(self, loss: Tensor) -> float:
        local = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach().clone()
        dist.all_reduce(local, group=self.mesh["dp"].get_group())
        return float(local) / self.ways


def tensor_plan(model: nn.Module, sites: Sites, sequence: bool) -> dict[str, Any]:
    """What ``parallelize_module`` is to do; with ``sequence`` the hidden state is split by tokens between blocks, and
    stays a DTensor there, so that the model still reads its whole length from it."""
    hidden = Shard(1) if sequence else Replicate()
    out: dict[str, Any] = {"output_layouts": hidden, "use_local_output": not sequence}
    plan: dict[str, Any] = {
        sites.embedding: RowwiseParallel(input_layouts=Replicate(), **out),
        sites.head: ColwiseParallel(input_layouts=hidden, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        plan[sites.last_norm] = SequenceParallel()
    for block in sites.block_names(model):
        for name, handed in sites.inputs:
            plan[f"{block}.{name}"] = _entry(handed, hidden)
        for name in sites.columns:
            plan[f"{block}.{name}"] = ColwiseParallel()
        for name in sites.rows:
            plan[f"{block}.{name}"] = RowwiseParallel(**out)
        for name in sites.norms if sequence else ():
            plan[f"{block}.{name}"] = SequenceParallel()
    return plan


def _entry(handed: str | int, hidden: Placement) -> PrepareModuleInput:
    """The hidden state becomes whole on entering a module."""
    if isinstance(handed, str):
        return PrepareModuleInput(
            input_kwarg_layouts={handed: hidden}, desired_input_kwarg_layouts={handed: Replicate()}
        )
    others = (None,) * (handed - 1)
    return PrepareModuleInput(input_layouts=(hidden, *others), desired_input_layouts=(Replicate(), *others))
