"""Every architecture: all layers of experts are recognised, and no dense architecture seems to have any."""

from __future__ import annotations

import pytest
from torch import nn

from autopar import zoo
from autopar.analysis.experts import routed_regions, unrecognised
from autopar.compiler import split_program
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.zoo.named import OURS, named_model

QUICK = {"llama", "deberta_v2", "mamba2", *OURS}
FEW = {"mixtral", "gpt_oss", "llama4_text", "granitemoe", "qwen3_moe", "moe"}
EXPERTS, CHOICES = 12, 2
ONE_CHOICE = {"llama4_text"}
NAMES = [*(name for name in zoo.ARCHITECTURES if zoo.architecture(name).family != "moe"), *OURS]
MIXTURES = [name for name in zoo.ARCHITECTURES if zoo.architecture(name).family == "moe"]


def layers_of_experts(model: nn.Module) -> list[str]:
    """The modules that hold a stack of matrices, one for each expert."""
    return [
        name
        for name, module in model.named_modules()
        if any(p.dim() == 3 and len(p) == EXPERTS for p in module.parameters(recurse=False))
    ]


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in [*MIXTURES, "moe"]]
)
def test_all_layers_of_a_mixture_are_recognised(name: str) -> None:
    if name != "moe":
        pytest.importorskip("transformers")
    example = named_model(f"hf:{name}" if name in MIXTURES else name, {}, batch=2, length=6)
    program = split_program(example.model, Mesh(), Plan(), (), example.batch, after="recognise_experts")
    regions = routed_regions(program)
    assert layers_of_experts(example.model) == [region.module for region in regions]
    assert {(region.experts, region.choices) for region in regions} == {(EXPERTS, 1 if name in ONE_CHOICE else CHOICES)}
    assert {len(region.products) for region in regions} == {3 if name == "moe" else 2}
    assert not unrecognised(program)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != "moe"]
)
def test_no_experts_are_seen_in_a_dense_model(name: str) -> None:
    if name not in OURS:
        pytest.importorskip("transformers")
    example = named_model(name if name in OURS else f"hf:{name}", {}, batch=2)
    program = split_program(example.model, Mesh(), Plan(), (), example.batch, after="recognise_experts")
    assert not routed_regions(program) and not unrecognised(program)
