"""What each process of a long pipelined training does: hundreds of steps, beside the unmodified model on rank 0."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from autopar import Mesh, Plan, parallelize
from autopar.models import gpt, llama

OPTIMIZERS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    # a larger eps: where a gradient is all but zero, Adam divides rounding by rounding
    "AdamW": {"lr": 1e-3, "eps": 1e-4},
}
LENGTHS = (10, 7, 10, 12)


def build(name: str) -> nn.Module:
    """Eight blocks: 4 ranks with two stages each have one in every stage. ``gpt`` ties embedding and head."""
    torch.manual_seed(0)
    if name == "gpt":
        return gpt.build(width=16, layers=8, heads=4, vocab=40).double()
    return llama.build(width=16, layers=8, heads=4, kv_heads=2, ff=24, vocab=40).double()


def batch(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Rows with unequally many labels; in every fifth batch the first half of the rows has none."""
    generator = torch.Generator().manual_seed(seed)
    first, stride = torch.randint(40, (2, rows, 1), generator=generator)
    ids = (first + (1 + stride % 3) * torch.arange(length)) % 40  # something that can be learned
    kept = torch.rand(rows, length, generator=generator) < torch.linspace(0.1, 0.9, rows)[:, None]
    kept[-1, 1:3] = True
    if seed % 5 == 4:
        kept[: rows // 2] = False
    return {"input_ids": ids, "labels": ids.masked_fill(~kept, -100)}


def batches(rows: int, tail: int, lengths: bool, steps: int) -> list[dict[str, Tensor]]:
    """Of ``steps`` steps; each seventh has ``tail`` rows, and with ``lengths`` sequences are of four lengths."""
    return [
        batch(tail if step % 7 == 6 else rows, LENGTHS[step % 4] if lengths else LENGTHS[0], step % 29)
        for step in range(steps)
    ]


def train(
    name: str, mesh: str, plan: dict[str, Any], rows: int, tail: int, lengths: bool, optimizer: str, steps: int
) -> dict[str, float]:
    """{what: worst relative error} on rank 0: of all losses, and of the parameters after the last step."""
    torch.set_default_dtype(torch.float64)
    reference = build(name) if os.environ["RANK"] == "0" else None
    parallel = parallelize(build(name), Mesh.parse(mesh), Plan(check_numerics=False, timeout=60, **plan))
    given = batches(rows, tail, lengths, steps)
    parallel.prepare(**given[0])
    ours = getattr(torch.optim, optimizer)(parallel.parameters(), **OPTIMIZERS[optimizer])
    losses = []
    for item in given:
        losses.append(float(parallel.train_step(**item).detach()))
        ours.step()
        ours.zero_grad()
    state = parallel.full_state_dict()
    if reference is None:
        return {}
    theirs = getattr(torch.optim, optimizer)(reference.parameters(), **OPTIMIZERS[optimizer])
    errors = {"loss": 0.0, "parameters": 0.0}
    for item, found in zip(given, losses, strict=True):
        loss = reference(**item)["loss"]
        loss.backward()
        theirs.step()
        theirs.zero_grad()
        errors["loss"] = max(errors["loss"], abs(found - float(loss.detach())) / float(loss.detach()))
    assert float(loss.detach()) < 0.8 * losses[0], "nothing was learned, so nothing was shown"
    for key, parameter in reference.state_dict().items():
        error = float((state[key] - parameter).abs().max() / parameter.abs().max().clamp(min=1e-30))
        errors["parameters"] = max(errors["parameters"], error)
    return errors
