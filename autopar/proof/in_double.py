"""A program in float64: the same graphs, in which each floating-point value, cast and constant is float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.ir.node import set_values, values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program


def in_double(program: AnyProgram) -> AnyProgram:
    """A copy of ``program`` in float64; complex values are complex128."""
    copy = program.clone()
    for graph in copy.graphs.values():
        _change(graph)
    return _with_tensors(copy)


def is_exact(program: AnyProgram) -> bool:
    """Whether the constants of ``program`` are in float64 what they are in the model: none was rounded to float32."""
    tensors = [*program.constants.values(), *(t for part in program.parts for t in part.constants.values())]
    return not any(tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) for tensor in tensors)


def _with_tensors(program: AnyProgram) -> AnyProgram:
    more: dict[str, Any] = {"constants": _doubled(program.constants), "made_buffers": _doubled(program.made_buffers)}
    if program.counts is not None:
        more["counts"] = in_double(program.counts)
    if isinstance(program, Program):
        return replace(program, **more)
    stages = tuple(stage for part in program.stages if isinstance(stage := _with_tensors(part), Program))
    tail = in_double(program.tail) if program.tail is not None else None
    assert tail is None or isinstance(tail, PipelinedProgram)
    return replace(program, **more, stages=stages, tail=tail)


def _doubled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(_dtype(tensor.dtype)) for name, tensor in tensors.items()}


def _change(graph: fx.Graph) -> None:
    for node in graph.nodes:
        set_values(node, *(replace(kind, dtype=_dtype(kind.dtype)) for kind in values(node)))
        node.args = pytree.tree_map_only(torch.dtype, _dtype, node.args)
        node.kwargs = pytree.tree_map_only(torch.dtype, _dtype, node.kwargs)


def _dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype
