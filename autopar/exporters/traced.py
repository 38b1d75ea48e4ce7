"""One trace for each role: a rank module as an exported program of torch, made without any tensor's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from autopar.errors import ExportError
from autopar.exporters.dynamic_sizes import DynamicSizes
from autopar.exporters.rank_module import Forms, Own, Part, RankModule
from autopar.ir.node import Node, value
from autopar.ir.tables import Input, Output
from autopar.ir.torch_export import export_as_run


@dataclass(frozen=True)
class Traced:
    """A role: ``exported`` has tensors without data as its state. ``own``: makers of what differs between ranks.

    ``inputs``: the placeholders that the module takes, ``outputs`` the results, both in order.
    """

    exported: ExportedProgram
    own: Mapping[str, Own]
    inputs: tuple[tuple[Node, Input], ...]
    outputs: tuple[Output, ...]


def traced(
    part: Part, *, runs: str = "inference", forms: Forms | None = None, sizes: DynamicSizes | None = None
) -> Traced:
    """The role of ``part``; ``runs`` and ``forms`` are those of :class:`RankModule`; ``sizes`` become dynamic dims.

    Raises ExportError for an operator without plain form.
    """
    mode = FakeTensorMode(
        allow_non_fake_inputs=True,
        shape_env=ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True),
    )

    def made(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with mode:
            return torch.empty(shape, dtype=dtype)

    module = RankModule(part, made, runs=runs, forms=forms, sizes=sizes)
    shapes = [value(node).layout.local_shape(part.mesh) for node in module.takes]
    if sizes is None:
        given = tuple(made(shape, value(node).dtype) for shape, node in zip(shapes, module.takes))
        dims = None
    else:
        examples = [[sizes.example(size) for size in shape] for shape in shapes]
        given = tuple(made(shape, value(node).dtype) for shape, node in zip(examples, module.takes))
        dims = (tuple(_dims(node, shape, sizes) for node, shape in zip(module.takes, shapes)),)
    with torch.no_grad():
        try:
            exported = export_as_run(module.eval(), given, dynamic_shapes=dims)
        except (UserError, ValueError, GuardOnDataDependentSymNode) as error:
            if sizes is None:
                raise
            raise ExportError(
                f"{part.name} has no form for all sizes: {str(error).splitlines()[0]:.300}\n"
                "Way out: export a program of fixed sizes (compile_program) for this model."
            ) from error
    return Traced(exported, dict(module.own), tuple(module.inputs), part.program.outputs)


def _dims(node: Node, shape: Sequence[Any], sizes: DynamicSizes) -> dict[int, Any]:
    """The dynamic dims of an input."""
    found = {dim: sizes.dim_of(size, f"dim {dim} of '{node.name}'") for dim, size in enumerate(shape)}
    return {dim: known for dim, known in found.items() if known is not None}
