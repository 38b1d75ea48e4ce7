"""One trace for each role: a rank module as an exported program of torch, made without any tensor's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autopar.exporters.rank_module import Forms, Own, Part, RankModule
from autopar.ir.node import Node, value
from autopar.ir.tables import Input, Output


@dataclass(frozen=True)
class Traced:
    """A role: ``exported`` has tensors without data as its state. ``own``: makers of what differs between ranks.

    ``inputs``: the placeholders that the module takes, ``outputs`` the results, both in order.
    """

    exported: ExportedProgram
    own: Mapping[str, Own]
    inputs: tuple[tuple[Node, Input], ...]
    outputs: tuple[Output, ...]


def traced(part: Part, *, runs: str = "inference", forms: Forms | None = None) -> Traced:
    """The role of ``part``; ``runs`` and ``forms`` are those of :class:`RankModule`.

    Raises ExportError for an operator without plain form.
    """
    mode = FakeTensorMode(
        allow_non_fake_inputs=True,
        shape_env=ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True),
    )

    def made(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    module = RankModule(part, made, runs=runs, forms=forms)
    given = tuple(made(value(node).layout.local_shape(part.mesh), value(node).dtype) for node in module.takes)
    with torch.no_grad():
        exported = torch.export.export(module.eval(), given, strict=False)
    return Traced(exported, dict(module.own), tuple(module.inputs), part.program.outputs)
