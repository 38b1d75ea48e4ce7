"""Models that torch.compile has wrapped, and DDP around a parallel one: each is refused with what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autopar
from autopar import LaunchError, Mesh


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def with_a_compiled_layer() -> nn.Module:
    model = layers()
    model[0] = torch.compile(model[0])  # type: ignore[assignment]
    return model


def compiled_in_place() -> nn.Module:
    model = layers()
    model[1].compile()
    return model


@pytest.fixture
def group(tmp_path: Any) -> Iterator[None]:
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if made:
        dist.destroy_process_group()


COMPILED: dict[str, tuple[Callable[[], Any], str]] = {
    "whole": (lambda: torch.compile(layers()), "model is an OptimizedModule.*before: model._orig_mod"),
    "a layer": (with_a_compiled_layer, "model.0 is an OptimizedModule.*before: model.0._orig_mod"),
    "in place": (compiled_in_place, r"model.1.compile\(\) was called.*Way out: leave that line out"),
}


@pytest.mark.parametrize("name", list(COMPILED))
def test_a_compiled_model_is_refused(name: str) -> None:
    made, message = COMPILED[name]
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        autopar.parallelize(made(), Mesh(dp=2))


def test_ddp_around_a_parallel_module_is_refused(group: None) -> None:
    model = autopar.parallelize(layers(), Mesh(dp=1))
    with pytest.raises(LaunchError, match="(?s)sends gradients itself.*Way out: train it as it is"):
        nn.parallel.DistributedDataParallel(model)
