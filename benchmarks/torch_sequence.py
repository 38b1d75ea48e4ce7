"""Sequence parallelism as users write it by hand: Hugging Face's model with its attention replaced, inside DDP.

Each rank gets its tokens with their positions and the labels that follow them; its loss is its part of the sum over the
number of labels. The attention is one of

    ring       keys and values travel by send and receive in zig-zag order, tiles merged by log-sum-exp, backward a ring
               of its own: the algorithm of ring-flash-attention (Zhu 2024) on torch's CPU kernels
    ulysses    all-to-alls of heads by torch's functional collectives around the plain attention (Jacobs et al. 2023)
    deepspeed  the same by DeepSpeed's own layer, where it is installed

torch's own ``context_parallel`` is not among them: it has no sharding strategy for the attention kernels of CPUs
(``NotImplementedError``, torch 2.13), and refuses the plain one ("mixed torch.Tensor and DTensor").
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders import Contender, loss_of
from benchmarks.subjects import Batch

aten = torch.ops.aten
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, S, D), (B, Hkv, S, D) twice -> (B, H, S, D)
IGNORED = -100


class HandWritten(Contender):
    """``model`` with its attention replaced by that of ``kind``; collective."""

    def __init__(self, model: nn.Module, kind: str, fused: bool) -> None:
        from transformers import AttentionInterface

        self.ranks, self.rank = dist.get_world_size(), dist.get_rank()
        self.mirrored = kind == "ring"
        AttentionInterface.register(kind, _interface(ATTENTIONS[kind]()))
        model.set_attn_implementation(kind)  # type: ignore[operator]
        super().__init__(DistributedDataParallel(model, broadcast_buffers=False), fused)

    def part(self, batch: Batch) -> Batch:
        """Of zig-zag order: chunks r and 2n - 1 - r of 2n."""
        tokens = batch["input_ids"]
        positions = torch.arange(tokens.shape[1])
        if self.mirrored:
            chunks = positions.chunk(2 * self.ranks)
            own = torch.cat([chunks[self.rank], chunks[2 * self.ranks - 1 - self.rank]])
        else:
            own = positions.chunk(self.ranks)[self.rank]
        following = functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        return {
            "input_ids": tokens[:, own],
            "position_ids": own[None],
            "labels": following[:, own],
            "shift_labels": following[:, own].contiguous(),
            "num_items_in_batch": (following != IGNORED).sum(),
        }

    def backward(self, loss: Tensor) -> None:
        (loss * self.ranks).backward()  # type: ignore[no-untyped-call]  # DDP takes the mean

    def forward(self, batch: Batch) -> Tensor:
        return loss_of(self.module(**batch))

    def whole_loss(self, loss: Tensor) -> float:
        dist.all_reduce(loss)
        return float(loss)


class Alone(Contender):
    """The unmodified model on rank 0, while the others wait."""

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) if dist.get_rank() == 0 else torch.zeros(())

    def backward(self, loss: Tensor) -> None:
        if dist.get_rank() == 0:
            super().backward(loss)

    def whole_loss(self, loss: Tensor) -> float:
        dist.broadcast(loss, 0)
        return float(loss)


def _interface(attention: Attention) -> Callable[..., tuple[Tensor, None]]:
    """``attention`` as Hugging Face's models call it: the result is (B, S, H, D)."""

    def called(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        assert mask is None, "the causal mask is the attention's own"
        return attention(q, k, v).transpose(1, 2).contiguous(), None

    return called


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


# ---------------------------------------------------------------- ring


def ring_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found: Tensor = _Ring.apply(q, k, v)  # type: ignore[no-untyped-call]
    return found


class _Ring(torch.autograd.Function):
    """Causal attention of rows in zig-zag order. At step 0 the local mask is causal; keys of a lower rank are seen by
    all rows, but only their first half; keys of a higher rank by the second half of the rows."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ranks, rank, half = dist.get_world_size(), dist.get_rank(), q.shape[2] // 2
        here = torch.stack([k, v])
        out, logsumexp = q, q
        for step in range(ranks):
            passing = _Exchange(here) if step + 1 < ranks else None
            keys, values = here
            if step == 0:
                out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, True)
            elif step <= rank:
                part = aten._scaled_dot_product_flash_attention_for_cpu(q, keys[:, :, :half], values[:, :, :half])
                _merge(out, logsumexp, *part)
            else:
                part = aten._scaled_dot_product_flash_attention_for_cpu(q[:, :, half:], keys, values)
                _merge(out[:, :, half:], logsumexp[:, :, half:], *part)
            here = passing.result() if passing else here
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        (grad,) = grads
        ranks, rank, half = dist.get_world_size(), dist.get_rank(), q.shape[2] // 2
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        here, dq = torch.stack([k, v]), q
        leaving: _Exchange | None = None  # the gradients of the keys that have left
        for step in range(ranks):
            passing = _Exchange(here) if step + 1 < ranks else None
            keys, values = here
            if step == 0:
                dq, dk, dv = kernel(grad, q, keys, values, out, logsumexp, 0.0, True)
                own = torch.stack([dk, dv])
            elif step <= rank:
                first = (keys[:, :, :half], values[:, :, :half])
                change, dk, dv = kernel(grad, q, *first, out, logsumexp, 0.0, False)
                dq += change
                own = _received(leaving)
                own[0, :, :, :half] += dk
                own[1, :, :, :half] += dv
            else:
                rows = [x[:, :, half:] for x in (grad, q, out, logsumexp)]
                change, dk, dv = kernel(*rows[:2], keys, values, *rows[2:], 0.0, False)
                dq[:, :, half:] += change
                own = _received(leaving)
                own[0] += dk
                own[1] += dv
            leaving = _Exchange(own, tag=1) if ranks > 1 else None
            here = passing.result() if passing else here
        dk, dv = _received(leaving) if leaving else own
        return dq, dk, dv


def _merge(out: Tensor, logsumexp: Tensor, other: Tensor, other_logsumexp: Tensor) -> None:
    """In place: rows (B, H, S, D) with their log-sum-exp (B, H, S)."""
    out -= torch.sigmoid(other_logsumexp - logsumexp).unsqueeze(-1) * (out - other)
    logsumexp -= functional.logsigmoid(logsumexp - other_logsumexp)


class _Exchange:
    """A tensor under way to the next rank, in exchange for that of the one before."""

    def __init__(self, sent: Tensor, tag: int = 0) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.sent, self.received = sent.contiguous(), torch.empty(sent.shape, dtype=sent.dtype)
        self.works = [
            dist.isend(self.sent, (rank + 1) % ranks, tag=tag),
            dist.irecv(self.received, (rank - 1) % ranks, tag=tag),
        ]

    def result(self) -> Tensor:
        for work in self.works:
            assert work is not None
            work.wait()
        return self.received


def _received(exchange: _Exchange | None) -> Tensor:
    assert exchange is not None
    return exchange.result()


# ---------------------------------------------------------------- all-to-all


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(_to_heads, (q, k, v))
    out = _causal(q, k, v)
    batch, heads, length, width = out.shape
    ranks = dist.get_world_size()
    parts = out.reshape(batch, heads, ranks, length // ranks, width).movedim(2, 0).contiguous()
    return _all_to_all(parts).movedim(0, 1).flatten(1, 2)


def _to_heads(x: Tensor) -> Tensor:
    """(B, H, S / n, D) -> (B, H / n, S, D)."""
    batch, heads, length, width = x.shape
    ranks = dist.get_world_size()
    parts = x.reshape(batch, ranks, heads // ranks, length, width).movedim(1, 0).contiguous()
    return _all_to_all(parts).movedim(0, 2).flatten(2, 3)


def _all_to_all(parts: Tensor) -> Tensor:
    """(n, ...): block i goes to rank i."""
    group = dist.group.WORLD
    assert group is not None
    sizes = [1] * group.size()
    found = functional_collectives.all_to_all_single_autograd(parts, sizes, sizes, group)
    waited: Tensor = functional_collectives.wait_tensor(found)  # type: ignore[no-untyped-call]
    return waited


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def _deepspeed() -> Attention:
    """DeepSpeed's layer, which has heads after the sequence: (B, S, H, D)."""
    import deepspeed  # type: ignore[import-not-found]
    from deepspeed.sequence.layer import DistributedAttention  # type: ignore[import-not-found]

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
        False  # an all-reduce of inference, compiled when it starts
    )
    deepspeed.comm.init_distributed(dist_backend="gloo", verbose=False)

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _causal(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    layer = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = layer(*(x.transpose(1, 2) for x in (q, k, v)), 0)
        return found.transpose(1, 2)

    return attention


ATTENTIONS: dict[str, Callable[[], Attention]] = {
    "ring": lambda: ring_attention,
    "ulysses": lambda: ulysses_attention,
    "deepspeed": _deepspeed,
}
