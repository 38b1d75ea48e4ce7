"""Scripts as people write them, five steps on two processes against the same script on one device, in float64.

Each script is written once, for any module and any optimizer: what it trains is the unmodified model, or the parallel
one on a mesh. ``python -m tests.end_to_end.test_scripts`` prints the table of differences.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import autopar
from autopar import Mesh, Plan
from autopar.models import gpt
from tests.against_one_process import difference, float64
from tests.launch import run_ranks
from tests.selection import slow_but

STEPS = 5
Wrap = Callable[[nn.Module], Any]
States = dict[str, dict[str, Tensor]]  # of each module that a script trains, at its end
SCRIPTS: dict[str, Callable[[Wrap], States]] = {}


def script(run: Callable[[Wrap], States]) -> Callable[[Wrap], States]:
    SCRIPTS[run.__name__.replace("_", " ")] = run
    return run


def batch(step: int, rows: int = 4) -> dict[str, Tensor]:
    return gpt.example_batch(gpt.PRESETS["tiny"], rows, 8, step)


def state_of(module: Any) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = module.full_state_dict() if hasattr(module, "full_state_dict") else module.state_dict()
    return {name: tensor.clone() for name, tensor in whole.items()}


# ---------------------------------------------------------------- the scripts


@script
def nanogpt(wrap: Wrap) -> States:
    """Two groups by number of dims, warm-up and cosine by hand, batches accumulated, clipping, a look at validation."""
    raw = float64(gpt.build)
    model = wrap(raw)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-3)
    for step in range(STEPS):
        if step == 2:
            model.eval()
            with torch.no_grad():
                losses = [float(model(**batch(100 + number))["loss"]) for number in range(2)]
            assert all(math.isfinite(loss) for loss in losses)
            model.train()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 3 if step < 3 else 5e-4 * (1 + math.cos(math.pi * (step - 3) / 2))
        for micro in range(3):
            (model(**batch(10 * step + micro))["loss"] / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"model": state_of(model)}


@script
def averaged_model(wrap: Wrap) -> States:
    """An exponential average of the model beside it, which is evaluated."""
    model = wrap(float64(gpt.build))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(STEPS):
        model(**batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    with torch.no_grad():
        loss = average(**batch(100))["loss"]
    return {"model": state_of(model), "average": {**state_of(average.module), "loss": loss.detach().clone()}}


class LowRank(nn.Module):
    """A frozen linear and a product of two thin ones beside it (LoRA, Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))  # type: ignore[no-any-return]


@script
def low_rank_fine_tune(wrap: Wrap) -> States:
    """All is frozen but the adapters; the optimizer has only those."""
    raw = float64(gpt.build)
    raw.requires_grad_(False)
    for block in raw.blocks:
        block.attn.qkv, block.mlp.fc = LowRank(block.attn.qkv), LowRank(block.mlp.fc)
    model = wrap(raw)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3)
    for step in range(STEPS):
        model(**batch(step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": state_of(model)}


@script
def accumulated_gradients(wrap: Wrap) -> States:
    """Three batches of different sizes and lengths for each step, a scheduler, an optimizer with momentum."""
    model = wrap(float64(gpt.build))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS)
    for step in range(STEPS):
        for micro, rows in enumerate((4, 2, 6)):
            model(**batch(10 * step + micro, rows))["loss"].mul(rows / 12).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return {"model": state_of(model)}


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths, widths[1:]):
        layers += [nn.Linear(wide, narrow), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


@script
def adversarial_pair(wrap: Wrap) -> States:
    """A generator and a discriminator with an optimizer each; losses outside of the models."""
    generator, discriminator = float64(lambda: perceptron(8, 16, 12)), float64(lambda: perceptron(12, 16, 2))
    generator, discriminator = wrap(generator), wrap(discriminator)
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-3)
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-3)
    yes, no = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    for step in range(STEPS):
        numbers = torch.Generator().manual_seed(step)
        noise, real = (torch.randn(4, width, generator=numbers) for width in (8, 12))
        of_discriminator.zero_grad()
        loss = F.cross_entropy(discriminator(real), yes)
        (loss + F.cross_entropy(discriminator(generator(noise).detach()), no)).backward()
        of_discriminator.step()
        of_generator.zero_grad()
        F.cross_entropy(discriminator(generator(noise)), yes).backward()
        of_generator.step()
    return {"generator": state_of(generator), "discriminator": state_of(discriminator)}


# ---------------------------------------------------------------- on one device, and on two processes


def differences(name: str, axes: dict[str, int], choices: dict[str, Any]) -> dict[str, float]:
    """The largest difference of the states of each module at the end."""
    plan = Plan(check_numerics=False, on_indivisible="replicate", **choices)
    found = SCRIPTS[name](lambda model: autopar.parallelize(model, Mesh(**axes), plan))
    expected = SCRIPTS[name](copy.deepcopy)
    assert [state.keys() for state in found.values()] == [state.keys() for state in expected.values()]
    pairs = ((key, found[key][entry], one) for key, state in expected.items() for entry, one in state.items())
    worst: dict[str, float] = {}
    for key, mine, theirs in pairs:
        worst[key] = max(worst.get(key, 0.0), difference(mine, theirs))
    return worst


MESHES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "dp=2": ({"dp": 2}, {}),
    "dp=2, zero=1": ({"dp": 2}, {"zero": 1}),
    "dp=2, zero=3": ({"dp": 2}, {"zero": 3}),
    "tp=2": ({"tp": 2}, {}),
}


@pytest.mark.parametrize("mesh", slow_but([1], list(MESHES)))
@pytest.mark.parametrize("name", slow_but([0, 3], list(SCRIPTS)))
def test_five_steps(name: str, mesh: str) -> None:
    for worst in run_ranks(differences, 2, name, *MESHES[mesh]):
        assert max(worst.values()) <= 1e-10, worst


def main() -> None:
    print(f"{'script':24}" + "".join(f"{mesh:>16}" for mesh in MESHES))
    for name in SCRIPTS:
        found = [max(run_ranks(differences, 2, name, *MESHES[mesh])[0].values()) for mesh in MESHES]
        print(f"{name:24}" + "".join(f"{worst:16.1e}" for worst in found))


if __name__ == "__main__":
    main()
