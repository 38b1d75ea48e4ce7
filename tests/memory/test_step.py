"""The bytes that are counted on shapes are those of the simulated ranks, to the byte, on whatever mesh and plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autopar.compiler import compile_program
from autopar.ir.batch import data_ways
from autopar.ir.program import AnyProgram
from autopar.memory.table import memory_of
from autopar.mesh import Mesh
from autopar.pipeline.microbatches import smaller
from autopar.plan import Plan
from autopar.precision import Precision
from autopar.simulate import simulate
from autopar.zoo.named import named_model
from tests.selection import slow_but

# drawn at random from all models that have names, the axes, and what a plan can say (seed 15)
DRAWN: list[tuple[str, str, dict[str, Any]]] = [
    ("hf:glm4", "dp=2", {}),
    ("hf:persimmon", "dp=2", {}),
    ("hf:distilbert", "pp=2,dp=2", {"recompute": "selective", "microbatches": 4, "schedule": "interleaved"}),
    (
        "hf:deberta_v2",
        "pp=2,tp=2",
        {"recompute": "selective", "sequence": "megatron", "microbatches": 4, "schedule": "interleaved"},
    ),
    ("hf:exaone4", "dp=3", {"zero": 3}),
    ("hf:t5", "tp=4", {}),
    ("hf:roberta", "pp=3,dp=2", {"zero": 2, "recompute": "full", "microbatches": 2, "schedule": "zb-h1"}),
    ("hf:qwen2", "pp=2", {"microbatches": 4, "schedule": "dualpipe-v"}),
    ("hf:qwen2", "dp=3", {"zero": 3}),
    ("hf:phi", "sp=2", {"recompute": "full", "precision": "bf16"}),
    ("hf:deit", "dp=3", {"zero": 3, "recompute": 0.5, "precision": "bf16"}),
    ("hf:granitemoe", "dp=2,sp=2", {"zero": 3, "recompute": "selective"}),
    ("hf:gpt_neox", "pp=2,tp=2", {"recompute": "full", "sequence": "megatron", "microbatches": 3, "schedule": "zb-h1"}),
    (
        "hf:mistral",
        "pp=2,tp=2",
        {"sequence": "megatron", "precision": "bf16", "microbatches": 4, "schedule": "interleaved"},
    ),
    ("hf:cohere", "tp=4", {"recompute": 0.5}),
    ("hf:beit", "tp=2", {"recompute": 0.5, "sequence": "megatron"}),
    ("hf:gptj", "dp=2", {"recompute": "selective"}),
    ("hf:gpt_oss", "pp=3,dp=2", {"zero": 2, "recompute": 0.5, "microbatches": 3, "schedule": "zb-h1"}),
    ("hf:beit", "dp=1,tp=1", {"zero": 2}),
    ("hf:granitemoe", "tp=4", {"recompute": "selective", "precision": "bf16"}),
    ("hf:bert", "pp=2,dp=2", {"zero": 2, "microbatches": 4, "schedule": "zb-v"}),
    ("hf:phi3", "dp=2,sp=2", {"zero": 2}),
    ("hf:granitemoe", "dp=1,tp=1", {"zero": 3, "recompute": 0.5}),
    ("gpt", "dp=2", {}),
    ("hf:llama4_text", "pp=2,ep=2", {"zero": 3, "capacity_factor": 1.25, "microbatches": 4, "schedule": "zb-v"}),
    ("transformer", "sp=2", {"recompute": 0.5}),
    ("hf:xlnet", "dp=2", {"zero": 2, "recompute": "selective", "precision": "bf16"}),
    ("hf:qwen2_moe", "pp=2,ep=2", {"zero": 1, "capacity_factor": 1.25, "microbatches": 4, "schedule": "zb-v"}),
    ("hf:nemotron", "sp=2", {}),
    ("hf:glm4", "dp=2,tp=2", {"zero": 3, "recompute": 0.5, "sequence": "megatron"}),
]
CHOSEN: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "dp=2", {"zero": 1}),
    ("llama", "dp=1,tp=1,sp=1", {}),
    ("llama", "pp=2,dp=2", {"microbatches": 5, "zero": 2}),  # the last microbatches are smaller
    ("hf:llama", "pp=2,dp=2", {"microbatches": 2, "schedule": "interleaved", "zero": 2, "recompute": "full"}),
    ("hf:llama", "dp=2,tp=2", {"zero": 3, "precision": "bf16"}),
    ("hf:mixtral", "ep=2,tp=2", {"capacity_factor": 1.25}),
    ("hf:llama", "sp=2,tp=2", {"attention": "ulysses"}),
    ("lstm", "dp=2", {}),
    ("dlrm", "dp=2,tp=2", {}),
    ("bert", "pp=4", {"microbatches": 4}),
    ("unet", "dp=2", {"zero": 3}),
]


def in_words(part: Any) -> str:
    return part if isinstance(part, str) else ",".join(f"{name}={value}" for name, value in part.items())


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    return {name: tensor.detach() for name, tensor in found.items()}


def made(model: str, mesh: str, choices: dict[str, Any]) -> tuple[AnyProgram, Any]:
    on = Mesh.parse(mesh)
    named = {**choices, "precision": Precision(param="bf16")} if "precision" in choices else choices
    example = named_model(model, {}, ways=data_ways(on) * choices.get("microbatches", 1))
    return compile_program(example.model, on, Plan(check_numerics=False, **named), (), example.batch), example


@pytest.mark.parametrize(("model", "mesh", "choices"), slow_but((0, 2), [*CHOSEN, *DRAWN]), ids=in_words)
def test_the_peak_is_that_of_the_simulated_ranks(model: str, mesh: str, choices: dict[str, Any]) -> None:
    program, example = made(model, mesh, choices)
    step = simulate(program, tensors_of(example.model), (), example.batch, emitted=False)
    small = smaller(example.batch, program.mesh, program.plan)
    for one in memory_of(program, small=small).ranks:
        assert one.step_peak == max(step.peak_bytes[one.first : one.last + 1])
        assert one.peak == sum(one.at_peak.values())


def test_the_bound_of_an_uneven_load_is_what_the_fullest_rank_holds() -> None:
    """A router without weights gives all tokens the same experts, which are on one rank."""
    example = named_model("moe", {"balance": 0.0, "layers": 1})
    for name, parameter in example.model.named_parameters():
        if "router" in name:
            nn.init.zeros_(parameter)
    program = compile_program(example.model, Mesh(ep=2), Plan(check_numerics=False), (), example.batch)
    step = simulate(program, tensors_of(example.model), (), example.batch, emitted=False)
    even, bound = (memory_of(program, uneven=uneven).largest.step_peak for uneven in (False, True))
    assert min(step.peak_bytes) < even < max(step.peak_bytes) == bound
