"""The peer: torch's three kinds of parallelism together, put together by hand as in torchtitan.

Each stage of ``torch.distributed.pipelining`` (see ``torch_pipeline``) is split by ``parallelize_module`` with the plan
of torch's tutorial (see ``torch_parallel``), and wrapped in DistributedDataParallel or ``fully_shard``. Logits are
gathered before the loss, as the schedule computes it outside of the module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from autopar.models.llama import next_token_loss
from benchmarks.contenders import Contender
from benchmarks.subjects import HF_SITES, Batch
from benchmarks.torch_pipeline import LlamaStage

DATA_FORMS = ("ddp", "fully_shard")


class ThreeAxes(Contender):
    """``model``, a ``LlamaForCausalLM``, on ``mesh`` (dims pp, dp and tp), with the schedule 1F1B."""

    def __init__(self, model: Any, mesh: DeviceMesh, data: str, microbatches: int, batch: Batch, fused: bool) -> None:
        self.rank, self.ways = mesh["dp"].get_local_rank(), mesh["dp"].size()
        self.number, self.count = mesh["pp"].get_local_rank(), mesh["pp"].size()
        self.replicas = mesh["dp"].get_group()
        module: nn.Module = LlamaStage(model, self.number, self.count)
        if mesh["tp"].size() > 1:
            parallelize_module(module, mesh["tp"], _tensor_plan(module))
        if self.ways > 1:
            module = self._data_parallel(module, mesh["dp"], data)
        super().__init__(module, fused)
        tokens = self.part(batch)["input_ids"].chunk(microbatches)[0]
        hidden = torch.zeros(*tokens.shape, model.config.hidden_size, requires_grad=True)
        logits = torch.zeros(*tokens.shape, model.config.vocab_size, requires_grad=True)
        stage = PipelineStage(
            module,
            self.number,
            self.count,
            torch.device("cpu"),
            input_args=(tokens if self.number == 0 else hidden,),
            output_args=(logits if self.number == self.count - 1 else hidden,),
            group=mesh["pp"].get_group(),
        )
        self.schedule = Schedule1F1B(stage, n_microbatches=microbatches, loss_fn=next_token_loss)

    def _data_parallel(self, module: nn.Module, mesh: DeviceMesh, data: str) -> nn.Module:
        if data == "ddp":
            return DistributedDataParallel(module, device_mesh=mesh)
        for layer in module.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def part(self, batch: Batch) -> Batch:
        return {name: whole.chunk(self.ways)[self.rank].contiguous() for name, whole in batch.items()}

    def forward(self, batch: Batch) -> Tensor:
        """The whole step; the loss is that of the last stage, and 0 on other ranks."""
        losses: list[Tensor] = []
        given = (batch["input_ids"],) if self.number == 0 else ()
        target = {"target": batch["labels"], "losses": losses} if self.number == self.count - 1 else {}
        self.schedule.step(*given, **target, return_outputs=False)
        return torch.stack(losses).detach().mean() if losses else torch.zeros(())

    def backward(self, loss: Tensor) -> None:
        """It is done."""

    def whole_loss(self, loss: Tensor) -> float:
        total = loss.clone()
        dist.all_reduce(total)
        return float(total) * self.count / dist.get_world_size()


def _tensor_plan(stage: nn.Module) -> dict[str, Any]:
    """For a :class:`~benchmarks.torch_pipeline.LlamaStage`, between whose parts hidden states are whole."""
    plan: dict[str, Any] = {}
    assert isinstance(stage, LlamaStage)
    if stage.embedding is not None:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
    if stage.head is not None:
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    for position in range(len(stage.layers)):
        block = f"layers.{position}"
        plan |= {f"{block}.{name}": ColwiseParallel() for name in HF_SITES.columns}
        plan |= {f"{block}.{name}": RowwiseParallel() for name in HF_SITES.rows}
        plan[f"{block}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Replicate()},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
        plan[f"{block}.mlp"] = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    return plan
