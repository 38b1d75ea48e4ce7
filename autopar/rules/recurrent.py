"""Recurrent layers: a sequence is computed step by step, so only the batch may be split."""

from __future__ import annotations

from typing import Any

import torch

from autopar.rules.factoring import Call, Dims, Factoring, Shape

aten = torch.ops.aten


def recurrent(batch_first: int) -> Any:
    """Rule for ``lstm, gru, rnn (x, states, weights, ...)``; argument ``batch_first`` says where the batch is."""

    def rule(call: Call) -> Factoring:
        names: set[str] = set()
        states = len(call.outputs) - 1

        def dims(tag: str, shape: Shape, batch: int | None) -> Dims:
            found = tuple(("b",) if i == batch else (f"{tag}_{i}",) for i in range(len(shape)))
            names.update(f for dim in found for f in dim)
            return found

        batched = len(call.inputs[0]) == 3
        first = (0 if call.argument(batch_first, "batch_first") else 1) if batched else None
        others = 1 if batched else None
        inputs = [dims("x", call.inputs[0], first)]
        for i, shape in enumerate(call.inputs[1:]):
            inputs.append(dims(f"in{i}", shape, others if i < states else None))
        outputs = [dims("y", call.outputs[0], first)]
        outputs += [dims(f"out{i}", shape, others) for i, shape in enumerate(call.outputs[1:])]
        whole = frozenset(names) - {"b"}
        sizes = dict.fromkeys(names, 2)
        if batched:
            sizes["b"] = call.inputs[0][first or 0]
        return Factoring(tuple(inputs), tuple(outputs), sizes, whole=whole)

    return rule


RULES: dict[Any, Any] = {
    aten.lstm.input: recurrent(8),
    aten.gru.input: recurrent(8),
    aten.rnn_tanh.input: recurrent(8),
    aten.rnn_relu.input: recurrent(8),
}
