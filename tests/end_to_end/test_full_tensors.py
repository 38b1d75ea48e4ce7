"""``full_tensor()`` of every parameter and gradient is the unmodified model's, however a rank holds its part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar import Mesh, Plan
from autopar.dtensors.piecewise import PiecewiseDTensor
from autopar.zoo.named import named_model
from tests.against_one_process import difference
from tests.launch import run_ranks

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
DENSE: dict[str, dict[str, Any]] = {
    "hf:gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 1},
    "hf:llama": {**SMALL, "num_hidden_layers": 1},
    "hf:qwen2": {**SMALL, "num_hidden_layers": 1},
    "hf:phi3": {**SMALL, "num_hidden_layers": 1},
    "hf:falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1},
    "hf:falcon_new": {"hidden_size": 32, "num_attention_heads": 8, "num_kv_heads": 4, "num_hidden_layers": 1},
    "hf:gpt_neox": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1},
    "gpt": {},
    "llama": {},
    "bert": {},
    "t5": {},
    "vit": {},
}
EXPERTS: dict[str, dict[str, Any]] = {
    "hf:mixtral": {**SMALL, "num_hidden_layers": 1},
    "hf:gpt_oss": {**SMALL, "num_hidden_layers": 1},
    "moe": {},
}


def in_float64() -> None:
    """Let models of transformers compute all in float64: some cast to float32 on the way."""
    given = Tensor.to
    owner: Any = Tensor
    owner.float = Tensor.double
    owner.to = lambda tensor, *args, **kw: given(
        tensor, *(torch.float64 if x is torch.float32 else x for x in args), **kw
    )


def names_off(names: dict[str, dict[str, Any]], mesh: Mesh, choices: dict[str, Any]) -> tuple[list[str], int]:
    """The tensors that differ, by model; and how many were piecewise."""
    torch.set_default_dtype(torch.float64)
    in_float64()
    wrong, count = [], 0
    for name, config in names.items():
        example = named_model(name, config, batch=4, length=None if name == "vit" else 8)
        model: Any = example.model.double().eval()
        if name.startswith("hf:"):
            model.config._experts_implementation = "batched_mm"  # the other ones have no float64
        reference: nn.Module = copy.deepcopy(model)
        parallel = autopar.parallelize(model, mesh, Plan(check_numerics=False, **choices))
        for runs in (parallel, reference):
            found = runs(**example.batch)
            (found["loss"] if isinstance(found, dict) or hasattr(found, "loss") else found).backward()
        held = dict(parallel.named_parameters())
        steepest = max(float(wanted.grad.abs().max()) for wanted in reference.parameters() if wanted.grad is not None)
        for key, wanted in reference.named_parameters():
            if key not in held or wanted.grad is None:  # experts of a list are one stack
                continue
            parts = [(held[key], wanted), (held[key].grad, wanted.grad)]
            assert all(isinstance(part, DTensor) for part, _ in parts)
            count += sum(isinstance(part, PiecewiseDTensor) for part, _ in parts)
            slope = (
                float((held[key].grad.full_tensor() - wanted.grad).abs().max()) / steepest
            )  # some are zero but for noise
            largest = max(difference(held[key], wanted), slope)
            wrong += [f"{name} {key}: {largest:.1e}"] if largest > 1e-10 else []
    return wrong, count


def expect_exact(names: dict[str, dict[str, Any]], mesh: Mesh, choices: dict[str, Any], piecewise: bool) -> None:
    for wrong, count in run_ranks(names_off, mesh.world_size, names, mesh, choices, timeout=600.0):
        assert not wrong, wrong
        assert bool(count) == piecewise


def test_fused_weights_over_tensor_parallel_ranks() -> None:
    expect_exact({"gpt": {}}, Mesh(tp=2), {}, piecewise=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "choices", "piecewise"),
    [
        pytest.param(Mesh(tp=2), {}, True, id="tp"),
        pytest.param(Mesh(dp=2), {"zero": 3}, False, id="zero"),
        pytest.param(Mesh(dp=2, tp=2), {"zero": 2}, True, id="both"),
    ],
)
def test_dense_models(mesh: Mesh, choices: dict[str, Any], piecewise: bool) -> None:
    expect_exact(DENSE, mesh, choices, piecewise)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(ep=2), Mesh(tp=2), Mesh(ep=2, tp=2)], ids=str)
def test_models_of_experts(mesh: Mesh) -> None:
    for wrong, _ in run_ranks(names_off, mesh.world_size, EXPERTS, mesh, {}, timeout=600.0):
        assert not wrong, wrong
