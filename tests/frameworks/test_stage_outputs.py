"""Outputs of the stages of a pipeline are on all ranks, in the order of their fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from autopar.frameworks.stage_outputs import on_all_ranks
from tests.launch import run_ranks


@dataclasses.dataclass
class Record:
    loss: Any = None
    logits: Any = None
    states: Any = None
    mask: Any = None


def given() -> dict[str, Any]:
    return {
        "loss": torch.ones(()),
        "logits": torch.arange(6.0).view(2, 3).t(),
        "states": (torch.ones(2), torch.ones(3)),
    }


def met() -> Any:
    dist.init_process_group("gloo")
    whole, rank = given(), dist.get_rank()
    first, last = whole["states"]
    here = Record(whole["loss"], whole["logits"] if rank else None, (None, last) if rank else (first, None))
    found = on_all_ranks(here, "cpu")
    dist.destroy_process_group()
    return dataclasses.asdict(found)


def test_every_rank_has_the_outputs_of_all_stages() -> None:
    for found in run_ranks(met, 2):
        assert list(found) == ["loss", "logits", "states", "mask"] and found["mask"] is None
        for name, value in given().items():
            pairs = zip(found[name], value) if isinstance(value, tuple) else [(found[name], value)]
            assert all(torch.equal(one, other) for one, other in pairs)
