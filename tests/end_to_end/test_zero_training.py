"""AdamW on ZeRO shards in real gloo processes: parameters after three steps are those of the unmodified model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.check import TOLERANCE
from autopar.frontend.numerics import promote_float32
from tests.against_one_process import Errors, worst
from tests.end_to_end.test_training import train
from tests.launch import run_ranks
from tests.passes.test_shard_parameters import Odd
from tests.selection import slow_but

ROWS, LENGTH = 12, 6  # rows that 1 to 4 ranks divide
STAGES = (0, 1, 2, 3)
GRID = [f"dp={dp},tp={tp}" for dp in (1, 2, 3, 4) for tp in (1, 2)] + ["dp_replicate=2,dp_shard=2"]
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 16, "n_layer": 1},
}


class OddLoss(Odd):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": super().forward(x)}


def hugging_face(name: str) -> Callable[[], nn.Module]:
    from tests.hugging_face import build

    return lambda: build(name, vocab_size=32, **SMALL[name])[0]


def tokens(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 32, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def numbers(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}


def train_stages(name: str, mesh: Mesh, stages: tuple[int, ...]) -> list[Errors]:
    """With clipping, and two batches for the first step."""
    found = []
    for stage in stages:
        plan = Plan(zero=stage, check_numerics=False, on_indivisible="replicate" if name == "odd" else "error")
        with promote_float32():
            if name == "odd":
                found.append(train(OddLoss, list(map(numbers, range(4))), mesh, plan, "adamw"))
            else:
                found.append(train(hugging_face(name), list(map(tokens, range(4))), mesh, plan, "adamw"))
    return found


def check_rows(name: str, text: str, stages: tuple[int, ...]) -> None:
    mesh = Mesh.parse(text)
    for rank, rows in enumerate(run_ranks(train_stages, mesh.world_size, name, mesh, stages)):
        for stage, errors in zip(stages, rows):
            if rank == 0:
                print(f"{name} {text} zero={stage}: {worst(errors)}")  # for pytest -s
            assert worst(errors) < (TOLERANCE, ""), (rank, stage, worst(errors))


@pytest.mark.parametrize(
    ("name", "mesh", "stage"),
    slow_but([0], [("odd", "dp=3", 3), ("llama", "dp=2", 1), ("gpt2", "dp_replicate=2,dp_shard=2", 2)]),
)
def test_adamw_on_shards(name: str, mesh: str, stage: int) -> None:
    if name != "odd":
        pytest.importorskip("transformers")
    check_rows(name, mesh, (stage,))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", GRID)
@pytest.mark.parametrize("name", ["odd", *SMALL])
def test_adamw_on_shards_everywhere(name: str, mesh: str) -> None:
    if name != "odd":
        pytest.importorskip("transformers")
    check_rows(name, mesh, STAGES)
