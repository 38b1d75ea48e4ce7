"""Each operator gives what its node says: local sizes and dtypes, found by running it on tensors without data.

A cast that is lost, an argument with the whole size where the local one belongs, a slice of another length: each makes
some node other than it says, or fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, values
from autopar.ir.operator_facts import runnable
from autopar.mesh import Mesh
from autopar.proof.refusal import Layer, Refusal

CAUSE = "an argument, or a cast, is not the one that this layout needs"
Type = tuple[tuple[int, ...], torch.dtype]


def check_types(graph: fx.Graph, mesh: Mesh, where: str) -> Iterator[Refusal]:
    """Refuse nodes of a role's graph whose operator gives other sizes or dtypes than they say."""
    with FakeTensorMode() as fake, torch.no_grad():
        for node in graph.nodes:
            if node.op != "call_function" or node.target in comm.TARGETS or not values(node):
                continue
            if any(not values(source) or _is_ragged(source) for source in (node, *node.all_input_nodes)):
                continue
            wanted = _types(node, mesh)
            try:
                found = _given(runnable(node.target)(*_tensors(node, mesh, fake)[0], **_tensors(node, mesh, fake)[1]))
            except NotImplementedError:
                continue
            except (RuntimeError, TypeError, ValueError, IndexError) as problem:
                first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
                shapes = [list(shape) for source in node.all_input_nodes for shape, _ in _types(source, mesh)]
                yield _refused(node, where, f"{node.target} fails on local sizes {shapes}: {first}")
                continue
            if found and found[: len(wanted)] != wanted:
                yield _refused(node, where, f"{node.target} gives {_words(found)}, the node says {_words(wanted)}")


def _is_ragged(node: Node) -> bool:
    return any(factor.ragged for kind in values(node) for dim in kind.layout.dims for factor in dim)


def _types(node: Node, mesh: Mesh) -> list[Type]:
    return [(kind.layout.local_shape(mesh), kind.dtype) for kind in values(node)]


def _tensors(node: Node, mesh: Mesh, fake: FakeTensorMode) -> tuple[Any, Any]:
    def made(source: Node) -> Any:
        found = [torch.empty(shape, dtype=dtype) for shape, dtype in _types(source, mesh)]
        return found[0] if len(found) == 1 else tuple(found)

    return fx.map_arg((node.args, node.kwargs), made)  # type: ignore[return-value]


def _given(result: Any) -> list[Type]:
    results = result if isinstance(result, tuple | list) else [result]
    return [(tuple(each.shape), each.dtype) for each in results if isinstance(each, Tensor)]


def _words(types: list[Type]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in types)


def _refused(node: Node, where: str, problem: str) -> Refusal:
    module = origin(node).module
    return Refusal(Layer.STRUCTURE, f"{where}: {node.name}{f' ({module})' if module else ''}", problem, CAUSE)
