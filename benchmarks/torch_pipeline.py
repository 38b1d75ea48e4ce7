"""The peer: Hugging Face's Llama cut by hand into the stages of ``torch.distributed.pipelining``.

As that package's tutorial does it: each stage is a module with a part of the layers, the first one also with the
embedding, the last one with the norm and the head; microbatches and their losses are the schedule's business. Layers
are dealt out evenly; where there are fewer than stages, embedding and head have stages of their own. Rotary tables are
computed by each stage, the causal mask is left to attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from autopar.models.llama import next_token_loss
from benchmarks.contenders import Contender
from benchmarks.subjects import Batch

# autopar's name -> (torch's schedule, stages on each rank)
SCHEDULES: dict[str, tuple[Callable[..., Any], int]] = {
    "gpipe": (ScheduleGPipe, 1),
    "1f1b": (Schedule1F1B, 1),
    "interleaved": (ScheduleInterleaved1F1B, 2),
    "zb-v": (ScheduleZBVZeroBubble, 2),
}


class LlamaStage(nn.Module):
    """Stage ``number`` of ``count`` of a ``LlamaForCausalLM``."""

    def __init__(self, model: Any, number: int, count: int) -> None:
        super().__init__()
        layers, is_last = model.model.layers, number == count - 1
        self.layers = layers[slice(*(_first_layer(place, count, len(layers)) for place in (number, number + 1)))]
        self.rotary = model.model.rotary_emb
        self.embedding = model.model.embed_tokens if number == 0 else None
        self.norm = model.model.norm if is_last else None
        self.head = model.lm_head if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T), or hidden states (B, T, C), to hidden states, or of the last stage to logits (B, T, V)."""
        x = self.embedding(x) if self.embedding is not None else x
        positions = torch.arange(x.shape[1]).unsqueeze(0)  # (1, T)
        tables = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=tables)
        return self.head(self.norm(x)) if self.norm is not None and self.head is not None else x


class TorchPipeline(Contender):
    """``model`` on all ranks of the process group; ``schedule`` is one of ``SCHEDULES``."""

    def __init__(self, model: nn.Module, schedule: str, microbatches: int, batch: Batch, fused: bool) -> None:
        kind, turns = SCHEDULES[schedule]
        rank, ranks = dist.get_rank(), dist.get_world_size()
        count = ranks * turns
        numbers = [rank, 2 * ranks - 1 - rank] if schedule == "zb-v" else range(rank, count, ranks)
        stages = [_stage(model, number, count, batch["input_ids"].chunk(microbatches)[0]) for number in numbers]
        self.is_first, self.is_last = 0 in numbers, count - 1 in numbers
        super().__init__(nn.ModuleList([stage.submod for stage in stages]), fused)
        given = stages if turns > 1 else stages[0]
        self.schedule = kind(given, n_microbatches=microbatches, loss_fn=next_token_loss)

    def forward(self, batch: Batch) -> Tensor:
        """The whole step; the loss is that of the last stage, and 0 on other ranks."""
        losses: list[Tensor] = []
        given = (batch["input_ids"],) if self.is_first else ()
        target = {"target": batch["labels"], "losses": losses} if self.is_last else {}
        self.schedule.step(*given, **target, return_outputs=False)
        return torch.stack(losses).detach().mean() if losses else torch.zeros(())

    def backward(self, loss: Tensor) -> None:
        """It is done."""

    def whole_loss(self, loss: Tensor) -> float:
        total = loss.clone()
        dist.all_reduce(total)
        return float(total)


def _stage(model: Any, number: int, count: int, tokens: Tensor) -> PipelineStage:
    """``tokens``: those of one microbatch. Shapes are given, so that ranks need not ask each other for them."""
    module = LlamaStage(model, number, count)
    # gradients cross where this says so
    hidden = torch.zeros(*tokens.shape, model.config.hidden_size, requires_grad=True)
    taken = tokens if number == 0 else hidden
    made = torch.zeros(*tokens.shape, model.config.vocab_size, requires_grad=True) if number == count - 1 else hidden
    return PipelineStage(module, number, count, torch.device("cpu"), input_args=(taken,), output_args=(made,))


def _first_layer(number: int, count: int, layers: int) -> int:
    """Of stage ``number`` of ``count``; that of the stage behind the last is the number of layers."""
    if count <= layers:
        return number * layers // count
    return min(max(number * (layers + 2) // count - 1, 0), layers)
