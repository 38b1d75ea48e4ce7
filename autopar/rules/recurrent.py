"""Recurrent layers: each step needs the whole state of the one before, so only the batch may be split."""

from __future__ import annotations

import math
from typing import Any

from autopar.operators.recurrent import RECURRENT_LAYER
from autopar.rules.factoring import Call, Dims, Factoring


def recurrent_layer(call: Call) -> Factoring:
    """x (T, B, I), states (B, ...), weights -> y (T, B, P), last (B, ...)."""
    (steps, batch, width), count = call.inputs[0], 1 + len(call.args[1])
    sizes = {"t": steps, "b": batch, "i": width}
    rows: Dims = (("b",) if batch != 1 else (),)
    inputs: list[Dims] = [(("t",), *rows, ("i",))]
    for number, shape in enumerate(call.inputs[1:], start=1):
        names = [f"w{number}_{dim}" for dim in range(len(shape))]
        sizes |= dict(zip(names, shape))
        inputs.append((*rows, (names[1],)) if number < count else tuple((name,) for name in names))
    sizes |= {"p": call.outputs[0][2], "q": call.outputs[1][1]}
    outputs: tuple[Dims, ...] = ((("t",), *rows, ("p",)), (*rows, ("q",)))
    whole = frozenset(sizes) - {"b"}
    work = steps * batch * sum(math.prod(shape) for shape in call.inputs[count:])
    return Factoring(tuple(inputs), outputs, sizes, whole=whole, contraction=True, work=work)


RULES: dict[Any, Any] = {
    RECURRENT_LAYER: recurrent_layer,
}
