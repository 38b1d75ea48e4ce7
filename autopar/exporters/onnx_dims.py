"""The dims of an ONNX model of a family, by the sizes of a batch: ``dim_param`` is ``s``, ``b/2`` or ``2*s``."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import sympy

from autopar.exporters.dynamic_sizes import DynamicSizes
from autopar.exporters.rank_module import Part
from autopar.exporters.traced import Traced
from autopar.ir.node import value


def name_sizes(model: onnx.ModelProto, part: Part, role: Traced, sizes: DynamicSizes) -> None:
    """Put sizes of the family in the places of the exporter's own names of dims."""
    shapes = [value(node).layout.local_shape(part.mesh) for node, _ in role.inputs]
    known = sizes.named(role.exported, shapes)
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = _in_sizes(dim.dim_param, known)


def _in_sizes(text: str, known: Mapping[str, sympy.Expr]) -> str:
    """``text``, as the exporter writes a dim; as it is where it is none of the sizes (rows that experts get)."""
    try:
        found = sympy.sympify(text, locals={name: sympy.Symbol(name) for name in known})
    except (sympy.SympifyError, TypeError, SyntaxError):
        return text
    replaced = found.subs({sympy.Symbol(name): form for name, form in known.items()}, simultaneous=True)
    return str(sympy.expand(replaced)).replace(" ", "")
