"""The one door to torch's Inductor, which is private to torch: a function of tensors in, a faster one out.

It is the compiler below ``torch.compile`` (Ansel et al. 2024, PyTorch 2): C++ on a CPU, Triton on a GPU, and a cache on
disk (``TORCHINDUCTOR_CACHE_DIR``) which all processes of a machine share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

Pure = Callable[[list[Tensor]], tuple[Tensor, ...]]  # empties the list, so that its tensors can be freed

SETTINGS: dict[str, Any] = {
    "compile_threads": 1,  # every rank compiles in its own process; a pool for each is more than a machine has
    "size_asserts": False,  # CompiledRegion looks at sizes and strides itself
    "fx_graph_cache": True,
    "freezing": False,
    "cpp_wrapper": False,
}
Check = Callable[..., bool]


def check_of(tensors: Sequence[Tensor]) -> Check:
    """A function that says of as many tensors whether they have the sizes, strides, dtypes, devices of ``tensors``.

    It is the guard of ``torch.compile``, in C++: 0.1 us for each tensor. It holds none of them. What it compares beside
    that (classes, autograd's modes) only makes it say no where it could say yes.
    """
    return torch._C._dynamo.guards.TensorGuards(  # type: ignore[no-any-return, attr-defined]
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    ).check


@cache
def inductor_of() -> Any:
    """What is used of the module, loaded when it is first needed: that takes 2 s."""
    from torch._inductor import compile_fx, config, cpp_builder, decomposition, exc, lowering

    class Inductor:
        compile, patch = compile_fx.compile_fx_inner, config.patch
        cxx_of, no_cxx = cpp_builder.get_cpp_compiler, exc.InvalidCxxCompiler
        decompositions = decomposition.select_decomp_table()
        lowerings, fallbacks = lowering.lowerings, lowering.fallbacks

    return Inductor


@cache
def takes(target: Any) -> bool:
    """Whether Inductor writes code for ``target``, an operator of torch's or a function of those; not: calls it."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    inductor = inductor_of()
    if target in inductor.fallbacks:
        return False
    return target in inductor.decompositions or target in inductor.lowerings or _is_composite(target)


def patched() -> Any:
    """A context with our :data:`SETTINGS`."""
    return inductor_of().patch(SETTINGS)


def _is_composite(target: torch._ops.OpOverload) -> bool:
    return target.namespace == "aten" and target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )


def compiler_missing(device: torch.device) -> str:
    """What is missing to compile for ``device``, or ``""``."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton"
    inductor = inductor_of()
    try:
        inductor.cxx_of()
    except inductor.no_cxx:
        return "a C++ compiler (g++ or clang++, or what CXX names)"
    return ""


def traced(function: Callable[[list[Tensor]], Sequence[Tensor]], given: Sequence[Tensor]) -> fx.GraphModule:
    """``function`` as a graph of Inductor's operators, for tensors with the sizes and strides of ``given``."""
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = _fake_mode()
    with mode:
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in given]
        trace = make_fx(lambda *args: tuple(function(list(args))), decomposition_table=inductor_of().decompositions)
        graph: fx.GraphModule = trace(*fakes)
    return graph


def compiled(graph: fx.GraphModule, given: Sequence[Tensor]) -> Pure:
    """What Inductor makes of a ``graph`` of :func:`traced`; it takes tensors with the sizes and strides of ``given``.

    Raises whatever Inductor does for a graph that it cannot compile.
    """
    from torch._guards import TracingContext, tracing

    inductor, mode = inductor_of(), _fake_mode()
    with mode:
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in given]
    with mode, tracing(TracingContext(mode)), patched():
        found = inductor.compile(graph, fakes)
    pure: Pure = found.current_callable or found
    return pure


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv())
