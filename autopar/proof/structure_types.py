"""Each operator gives what its node says: local sizes and dtypes, found by running it on tensors without data.

A cast that is lost, an argument with the whole size where the local one belongs, a slice of another length: each makes
some node other than it says, or fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


Verdict = tuple[tuple[Type, ...], str]  # what an operator gives, or why it fails


class Types:
    """The types that operators give for operands of given types; each is found once, since blocks repeat."""

    def __init__(self) -> None:
        self._known: dict[Any, Verdict] = {}

    def check(self, graph: fx.Graph, mesh: Mesh, where: str) -> Iterator[Refusal]:
        """Refuse nodes of a role's graph whose operator gives other sizes or dtypes than they say."""
        local = {node: _types(node, mesh) for node in graph.nodes}
        for node in graph.nodes:
            if node.op != "call_function" or node.target in comm.TARGETS or not values(node):
                continue
            if any(not values(source) or _is_ragged(source) for source in (node, *node.all_input_nodes)):
                continue
            wanted = local[node]
            found, problem = self._given(node, local)
            if problem:
                shapes = [list(shape) for source in node.all_input_nodes for shape, _ in local[source]]
                yield _refused(node, where, f"{node.target} fails on local sizes {shapes}: {problem}")
            elif found and found[: len(wanted)] != wanted:
                yield _refused(node, where, f"{node.target} gives {_words(found)}, the node says {_words(wanted)}")

    def _given(self, node: Node, local: Mapping[Node, tuple[Type, ...]]) -> Verdict:
        key = node.target, repr(fx.map_arg((node.args, node.kwargs), lambda source: local[source]))  # type: ignore[arg-type, return-value]
        if key not in self._known:
            self._known[key] = _run(node, local)
        return self._known[key]


def _run(node: Node, local: Mapping[Node, tuple[Type, ...]]) -> Verdict:
    """The operator on tensors without data."""

    def made(source: Node) -> Any:
        found = tuple([torch.empty(shape, dtype=dtype) for shape, dtype in local[source]])
        return found[0] if len(found) == 1 else found

    with FakeTensorMode(), torch.no_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), made)  # type: ignore[misc]
        try:
            result = runnable(node.target)(*args, **kwargs)
        except NotImplementedError:
            return (), ""
        except (RuntimeError, TypeError, ValueError, IndexError) as problem:
            return (), (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    results = result if isinstance(result, tuple | list) else [result]
    return tuple((tuple(each.shape), each.dtype) for each in results if isinstance(each, Tensor)), ""


def _is_ragged(node: Node) -> bool:
    return any(factor.ragged for kind in values(node) for dim in kind.layout.dims for factor in dim)


def _types(node: Node, mesh: Mesh) -> tuple[Type, ...]:
    return tuple([(kind.layout.local_shape(mesh), kind.dtype) for kind in values(node)])


def _words(types: Sequence[Type]) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in types)


def _refused(node: Node, where: str, problem: str) -> Refusal:
    module = origin(node).module
    return Refusal(Layer.STRUCTURE, f"{where}: {node.name}{f' ({module})' if module else ''}", problem, CAUSE)
