"""The operations that a model needs, however it is split, and what devices could do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autopar import Mesh, Plan, compile_program
from autopar.cost.device_peaks import PEAKS, peak_flops, peak_of
from autopar.cost.model_flops import forward_flops, learning_flops


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)).sum()


PRODUCTS = 2 * 8 * (8 * 32 + 32 * 8)  # of 8 rows


@pytest.mark.parametrize(
    "axes, plan",
    [("dp=1", Plan()), ("dp=2,tp=2", Plan(zero=3, recompute="full")), ("pp=2,tp=2", Plan(microbatches=4))],
    ids=["one", "split", "pipeline"],
)
def test_the_model_needs_the_same_on_every_mesh(axes: str, plan: Plan) -> None:
    program = compile_program(Mlp(), Mesh.parse(axes), plan, kwargs={"x": torch.randn(8, 8)})
    found = plan.microbatches * forward_flops(program)
    assert PRODUCTS <= found <= PRODUCTS + 8 * 8 + plan.microbatches, "and a sum"
    assert plan.microbatches * learning_flops(program) == 3 * found


def test_peaks_by_the_name_of_the_device() -> None:
    half = torch.bfloat16
    for name, tflops in {
        "NVIDIA H100 80GB HBM3": 989.5,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H200": 989.5,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA A10": 125.0,
        "AMD Instinct MI300X": 1307.4,
    }.items():
        assert peak_of(name, half) == tflops * 1e12, name
    assert peak_of("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_of("NVIDIA A100-SXM4-80GB", torch.float32, allows_tf32=True) == 156e12
    assert peak_of("Tesla V100-SXM2-16GB", half) is None, "it has no such products"
    assert peak_of("Tesla V100-SXM2-16GB", torch.float32, allows_tf32=True) == 15.7e12
    assert peak_of("NVIDIA A10G", half) is None and peak_of("a new one", half) is None
    assert peak_flops(torch.device("cpu"), half) is None
    assert all(peak.source for peak in PEAKS)
