"""One run of a program's graph under a recorder, at the local sizes of one rank."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.autodiff.autograd import without_anomalies
from autopar.autodiff.derivatives import DERIVATIVES
from autopar.autodiff.recorder import TENSORS, Recorder
from autopar.errors import AutoparError, InvariantError
from autopar.ir.node import Node, origin, set_origin, set_values, value, values
from autopar.ir.program import Program
from autopar.ir.repeated_heads import unrepeated_heads
from autopar.operators import ATTENTIONS


class ForwardRun:
    """One run of a program's graph under a recorder, on tensors of the local sizes."""

    def __init__(self, program: Program, recorder: Recorder, blocks: Mapping[Node, int]) -> None:
        self.program, self.recorder, self.blocks = program, recorder, blocks
        self.tensors: dict[Node, Any] = {}
        self.named: dict[Any, None] = {}  # nodes of autograd's graph that have their origin already
        self.inputs = tuple(self._input(node) for node in program.graph.nodes if node.op == "placeholder")

    def _input(self, node: Node) -> Node:
        with self.recorder.paused():
            kind = value(node)
            shape = kind.layout.local_shape(self.program.mesh)
            tensor = self.tensor(shape, kind.dtype, kind.requires_grad)
        self.tensors[node] = tensor
        placed = self.recorder.placeholder(node.name, tensor)
        set_values(placed, kind)
        set_origin(placed, origin(node))
        return placed

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False) -> Any:
        return torch.empty(shape, dtype=dtype, requires_grad=requires_grad)

    def leaves(self) -> dict[str, Any]:
        """The tensors whose gradients are required: parameters, then inputs and received values, by their names."""
        return {entry.target: self.tensors[node] for node, entry in self.program.leaves()}

    def outputs(self) -> list[Any]:
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.recorder.origin, self.recorder.expected = origin(node), (node.target, node.name)
                self.recorder.block = self.blocks.get(node)
                self.tensors[node] = self._result(node)
                self.name_gradients(node)
                self._keep_layout(node)
        return [self.tensors[node] for node in self.program.returned]

    def _result(self, node: Node) -> Any:
        if node.op != "call_function":
            raise InvariantError(f"{node.name} is a {node.op} node; a program has only functions and placeholders")
        given = node.args
        if node.target in ATTENTIONS:
            fewer = unrepeated_heads(given[1], given[2], lambda x: self.tensors[x].shape)  # type: ignore[arg-type]
            given = (given[0], *fewer, *given[3:])
        args, kwargs = fx.map_arg((given, node.kwargs), self.tensors.__getitem__)
        try:
            return self.called(node, args, kwargs)
        except AutoparError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as problem:
            raise InvariantError(_failure(node, args, kwargs, problem)) from problem

    def called(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.target in DERIVATIVES:
            return DERIVATIVES[node.target](self.recorder, *args, **kwargs)  # type: ignore[index]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _keep_layout(self, node: Node) -> None:
        """The recorded node of the same name holds the node's value, so it gets its layout."""
        types, tensor = values(node), self.tensors[node]
        if len(types) == 1 and isinstance(tensor, TENSORS):
            recorded = self.recorder.node_of(tensor)
            if recorded.name == node.name and types[0].layout.local_shape(self.program.mesh) == tensor.shape:
                set_values(recorded, replace(types[0], requires_grad=False))

    def name_gradients(self, node: Node) -> None:
        """Give the origin of ``node`` to the backward nodes that torch derives from it."""
        tensors = [item for item in pytree.tree_leaves(self.tensors[node]) if isinstance(item, Tensor)]
        wanted = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        # autograd holds the hooks, and tensors that the recorder holds hold autograd's nodes: no collector sees that
        where, block, recorder = origin(node), self.blocks.get(node), weakref.ref(self.recorder)

        def enter(_: Any) -> None:
            found = recorder()
            assert found is not None, "recording while torch derives"
            found.origin, found.block = where, block

        while wanted:
            step = wanted.pop()
            if step not in self.named:
                self.named[step] = None
                step.register_prehook(enter)
                wanted += [source for source, _ in step.next_functions if source is not None]

    def backward(self, outputs: Sequence[Any], leaves: Sequence[Any]) -> tuple[tuple[Node, ...], list[Any]]:
        """The tangent placeholders and the gradient of each leaf, None where there is no path to it."""
        if not outputs or not leaves:
            return (), [None] * len(leaves)
        tangents, nodes = [], []
        for output in outputs:
            with self.recorder.paused():
                tangent = self.tensor(output.shape, output.dtype)
            nodes.append(self.recorder.placeholder(f"grad_{self.recorder.node_of(output).name}", tangent))
            tangents.append(tangent)
        found = self.gradients(outputs, tangents, leaves)
        self.recorder.block = None
        # a gradient that is a strided or broadcast view would be a trap for optimizers and buckets
        return tuple(nodes), [None if grad is None else self.contiguous(grad) for grad in found]

    def gradients(self, outputs: Sequence[Any], tangents: Sequence[Any], leaves: Sequence[Any]) -> Sequence[Any]:
        with without_anomalies():
            return torch.autograd.grad(list(outputs), list(leaves), list(tangents), allow_unused=True)

    def contiguous(self, gradient: Any) -> Any:
        return gradient.contiguous()


def _failure(node: Node, args: Any, kwargs: Any, problem: Exception) -> str:
    shapes = [list(item.shape) for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
    where = origin(node)
    place = f" ({where.module}{'; ' + where.source if where.source else ''})" if where.module or where.source else ""
    reason = str(problem).strip().splitlines() or [type(problem).__name__]
    return (
        f"{node.name} = {node.target}{place} cannot run on the local shapes {shapes}: {reason[0]}\n"
        f"a pass that cut its inputs left arguments of the old sizes behind, or its rule is wrong"
    )
