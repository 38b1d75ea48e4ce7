"""The door to torch's Inductor: what is used of it, which is private to torch, does what it is used for."""

from __future__ import annotations

import importlib

import pytest
import torch

from autopar.inductor import torch_inductor
from autopar.inductor.torch_inductor import SETTINGS, check_of, compiler_missing, takes, traced
from autopar.operators import ATTENTION

aten = torch.ops.aten

NAMES = {
    "torch._inductor.compile_fx": ["compile_fx_inner"],
    "torch._inductor.config": ["patch", *SETTINGS],
    "torch._inductor.cpp_builder": ["get_cpp_compiler"],
    "torch._inductor.decomposition": ["select_decomp_table"],
    "torch._inductor.exc": ["InvalidCxxCompiler"],
    "torch._inductor.lowering": ["lowerings", "fallbacks"],
    "torch._subclasses.fake_tensor": ["FakeTensorMode"],
    "torch._C._dynamo.guards": ["TensorGuards"],
    "torch._guards": ["TracingContext", "tracing"],
    "torch.fx.experimental.proxy_tensor": ["make_fx"],
    "torch.fx.experimental.symbolic_shapes": ["ShapeEnv", "DimDynamic"],
    "torch._dynamo.source": ["ConstantSource"],
}


@pytest.mark.parametrize("module, names", NAMES.items(), ids=list(NAMES))
def test_torch_has_what_is_used(module: str, names: list[str]) -> None:
    missing = [name for name in names if not hasattr(importlib.import_module(module), name)]
    assert not missing, f"this torch has no {module}.{missing[0]}: autopar/inductor/torch_inductor.py has to change"


@pytest.mark.parametrize(
    "target, is_taken",
    [
        (aten.mul.Tensor, True),
        (aten._log_softmax.default, True),
        (aten.linear.default, True),
        (aten.convolution_backward.default, False),
        (ATTENTION, False),
    ],
    ids=str,
)
def test_operators_that_it_writes_code_for(target: torch._ops.OpOverload, is_taken: bool) -> None:
    assert takes(target) is is_taken


def test_a_function_is_traced_for_the_strides_of_its_tensors() -> None:
    """``reshape`` of a transposed matrix copies, of another does not."""

    def flat(given: list[torch.Tensor]) -> tuple[torch.Tensor]:
        return (given[0].reshape(-1) * 2,)

    x = torch.randn(3, 4)
    copies = [
        sum(node.target is aten.clone.default for node in traced(flat, [each]).graph.nodes) for each in (x, x.t())
    ]
    assert copies == [0, 1]


def test_tensors_of_other_sizes_strides_and_dtypes_are_told_apart() -> None:
    x, y = torch.randn(3, 4), torch.nn.Parameter(torch.randn(4))
    fits = check_of([x, y])
    assert fits(x, y) and fits(x + 1, torch.nn.Parameter(y + 1))
    for other in (torch.randn(4, 4), torch.randn(4, 3).t(), x.double(), torch.randn(12), x.to("meta")):
        assert not fits(other, y)


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler_missing(torch.device("cpu")) == ""
    inductor = torch_inductor.inductor_of()

    def none() -> str:
        raise inductor.no_cxx

    monkeypatch.setattr(inductor, "cxx_of", none)
    assert "C++ compiler" in compiler_missing(torch.device("cpu"))
