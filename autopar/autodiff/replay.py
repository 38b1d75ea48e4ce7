"""Recording a program call by call: what torch makes of equal calls is listened to once (``call_records``).

Autograd goes through its steps from the last one made to the first, and adds up the gradients of a tensor as they
arrive. So the calls of a program, gone through backwards, give what recording them all at once gives, node by node.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.autodiff.call_records import Calls, Replayed, Unheard, outlines
from autopar.autodiff.derivatives import DERIVATIVES
from autopar.autodiff.forward_run import ForwardRun
from autopar.autodiff.outline import Outline
from autopar.autodiff.recorder import Recorder
from autopar.ir.node import Node, origin
from autopar.ir.program import Program

aten = torch.ops.aten


class ReplayRun(ForwardRun):
    """One run of a program's graph, each call from its record. Raises Unheard where no record can say what happens."""

    def __init__(self, program: Program, recorder: Recorder, blocks: Mapping[Node, int], calls: Calls) -> None:
        self._calls, self._memories = calls, itertools.count()
        self._replayed: list[tuple[Node, Replayed]] = []
        self._gradients: dict[int, Outline] = {}  # id(tensor) -> what has arrived for it
        super().__init__(program, recorder, blocks)
        leaves = {node for node, _ in program.leaves()}
        if any(self.tensors[node].requires_grad and node not in leaves for node in self.tensors):
            raise Unheard("a gradient that nobody asked for")

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False) -> Any:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * max(size, 1))
        return Outline(dtype, torch.Size(shape), tuple(strides[: len(shape)]), next(self._memories), 0, requires_grad)

    def called(self, node: Node, args: Any, kwargs: Any) -> Any:
        if node.target is operator.getitem:
            return args[0][args[1]]
        replayed, result = self._again(node.target, args, kwargs)
        self._replayed.append((node, replayed))
        return result

    def _again(self, target: Any, args: Any, kwargs: Any) -> tuple[Replayed, Any]:
        def run(recorder: Recorder, args: Any, kwargs: Any) -> Any:
            return DERIVATIVES[target](recorder, *args, **kwargs) if target in DERIVATIVES else target(*args, **kwargs)

        record = self._calls.record(run, target, args, kwargs)
        replayed = Replayed(record, list(outlines((args, kwargs))), self._memories)
        return replayed, replayed.forward(self.recorder)

    def name_gradients(self, node: Node) -> None:
        """Done as they are made."""

    def gradients(self, outputs: Sequence[Any], tangents: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
        for output, tangent in zip(outputs, tangents):
            self._give(output, tangent)
        for node, replayed in reversed(self._replayed):
            found = [self._gradients.pop(id(output), None) for output in replayed.outputs]
            if any(gradient is not None for gradient in found):
                self.recorder.origin, self.recorder.block = origin(node), self.blocks.get(node)
                replayed.backward(found, self.recorder, self._give)
        return [self._gradients.get(id(leaf)) for leaf in leaves]

    def contiguous(self, gradient: Any) -> Any:
        return gradient if gradient.is_contiguous() else self._again(Tensor.contiguous, (gradient,), {})[1]

    def _give(self, operand: Outline, gradient: Outline) -> None:
        there = self._gradients.get(id(operand))
        if there is not None:
            gradient = self._again(aten.add.Tensor, (there, gradient), {})[1]
        self._gradients[id(operand)] = gradient
