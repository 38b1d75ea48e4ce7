"""The peer: DeepSpeed with experts dealt out over all ranks, in both forms that it has.

``Layers`` is Hugging Face's Mixtral with each of its mixtures replaced by ``deepspeed.moe.layer.MoE`` (Rajbhandari et
al. 2022): buffers of seats for each expert, as many as the fullest expert of any rank needs, sent by even all-to-alls.
``Automatic`` is the unmodified model under its setting ``expert_parallel`` (AutoEP), which puts torchtitan's scheme in
place of the mixtures: uneven all-to-alls of rows. Both run in the engine as :class:`DeepSpeed` does, and drop no row.
AutoEP's grouped products are for bfloat16 on GPUs, so the loop over experts that it has beside them is taken.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.contenders import RATE, Optimizers
from benchmarks.deepspeed_parallel import DeepSpeed, deepspeed
from benchmarks.subjects import BATCH

EXCHANGES = 4  # of the rows of a layer in a step: out and back, forward and backward
BLOCK = "MixtralSparseMoeBlock"


class Experts(DeepSpeed):
    """What both forms have in common. ``layers``: those that replaced the mixtures, in order."""

    def __init__(self, model: nn.Module, fused: bool, kind: type[nn.Module], **more: Any) -> None:
        super().__init__(model, BATCH, _adamw(fused), **more)
        self.steps = 0
        self.layers: list[Any] = [module for module in self.engine.module.modules() if isinstance(module, kind)]
        assert self.layers, "no mixture was replaced"

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        self.steps += 1

    def sent(self) -> int:
        """Bytes that this rank sends in a step, on the mean of the steps until now; collective."""
        shared = [p for p in self.engine.module.parameters() if getattr(p, "allreduce", True)]
        return 2 * sum(p.nbytes for p in shared) * (self.ranks - 1) // self.ranks + self._of_rows() // self.steps

    def _of_rows(self) -> int:
        """Bytes that have left this rank until now in exchanges of rows."""
        raise NotImplementedError


def _adamw(fused: bool) -> Optimizers:
    return lambda parameters: torch.optim.AdamW(parameters, lr=RATE, fused=fused)


# ---------------------------------------------------------------- DeepSpeed-MoE


class Layers(Experts):
    """``model`` with each mixture replaced by ``deepspeed.moe.layer.MoE`` with the same weights; collective."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        deepspeed()
        from deepspeed.moe.layer import MoE

        for name, block in [*model.named_modules()]:
            if type(block).__name__ == BLOCK:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, _Output(_layer(MoE, block)))
        super().__init__(model, fused, MoE)
        self.left = 0
        for layer in self.layers:
            layer.deepspeed_moe.experts.register_forward_pre_hook(self._count)

    def _count(self, _: nn.Module, given: tuple[Tensor]) -> None:
        """``given``: the seats of this rank's experts (n, E / n, seats, H), as many as it had for all the others."""
        self.left += EXCHANGES * given[0].nbytes * (self.ranks - 1) // self.ranks

    def _of_rows(self) -> int:
        return self.left


class _Output(nn.Module):
    """The output of a layer alone, of what DeepSpeed's returns."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.layer(tokens)[0]
        return found


class _Gated(nn.Module):
    """One expert of Mixtral: ``both`` (2 I, H) and ``down`` (H, I)."""

    def __init__(self, width: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = self.both(rows).chunk(2, -1)
        y: Tensor = self.down(self.activation(gate) * up)
        return y


def _layer(kind: Any, block: Any) -> nn.Module:
    """Of each token the two best experts, none dropped, the second without noise: the settings that are Mixtral's."""
    ranks, rank, whole = dist.get_world_size(), dist.get_rank(), block.experts
    count, width, inner = whole.down_proj.shape
    layer: nn.Module = kind(
        width,
        _Gated(width, inner, whole.act_fn).to(whole.down_proj.dtype),
        num_experts=count,
        ep_size=ranks,
        k=block.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    moe: Any = layer.deepspeed_moe
    with torch.no_grad():
        moe.gate.wg.weight.copy_(block.gate.weight)
        own = zip(whole.gate_up_proj.chunk(ranks)[rank], whole.down_proj.chunk(ranks)[rank], strict=True)
        for expert, (both, down) in zip(moe.experts.deepspeed_experts, own, strict=True):
            expert.both.weight.copy_(both)
            expert.down.weight.copy_(down)
    return layer


# ---------------------------------------------------------------- AutoEP


class Automatic(Experts):
    """The unmodified ``model`` under ``expert_parallel``; collective."""

    def __init__(self, model: nn.Module, fused: bool) -> None:
        deepspeed()
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        for (
            module
        ) in model.modules():  # DeepSpeed 0.19 cannot read transformers 5.24's records, of which there are none
            if hasattr(module, "_can_record_outputs"):
                module._can_record_outputs = {}  # type: ignore[assignment]
        ranks = dist.get_world_size()
        setting = {"enabled": True, "autoep_size": ranks, "preset_model": "mixtral", "use_grouped_mm": False}
        super().__init__(model, fused, AutoEPMoELayer, expert_parallel=setting)

    def _of_rows(self) -> int:
        chosen = torch.stack([layer.tokens_per_expert for layer in self.layers])  # (layers, E), of all steps
        everywhere = [torch.empty_like(chosen) for _ in range(self.ranks)]
        dist.all_gather(everywhere, chosen)
        rows = torch.stack(everywhere).view(self.ranks, len(self.layers), self.ranks, -1).sum((1, 3))  # from, to
        leaving = rows[self.rank].sum() + rows[:, self.rank].sum() - 2 * rows[self.rank, self.rank]
        weight = self.layers[0].experts.w1
        return int(leaving) * EXCHANGES // 2 * weight.shape[-1] * int(weight.itemsize)
