"""A traced role as an ONNX model without data, by torch's exporter; collectives are those of ``autopar.collective``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir
import onnxscript
import torch
from onnx_ir.passes import common

from autopar.errors import ExportError
from autopar.exporters import functional
from autopar.exporters.collective_schemas import DOMAIN, VERSION, register
from autopar.exporters.onnx_functions import Functions
from autopar.exporters.onnx_notes import reason_of, without_notes
from autopar.exporters.onnx_numbers import exact_numbers
from autopar.exporters.traced import Traced
from autopar.exporters.wiring import input_name, output_name

OPSET = 20  # of ONNX itself: what ONNX Runtime has read since 1.17
LEAST_OPSET, LEAST_IR = 18, 8  # those of torch's exporter, and of external data and functions
UNKNOWN: dict[str, Any] = {"group": [0], "collective_id": -1}  # until the file of a rank is written


def translations(opset: int) -> dict[Any, Callable[..., Any]]:
    """torch's functional collectives -> what stands for them; and what else torch.onnx does otherwise."""
    register()
    collective, standard = onnxscript.values.Opset(DOMAIN, VERSION), onnxscript.values.Opset("", opset)

    def all_reduce(x: Any, reduce_op: str, group: str) -> Any:
        return collective.AllReduce(x, reduce_op=reduce_op, group_name=group, **UNKNOWN)

    def all_gather(x: Any, ways: int, group: str) -> Any:
        return collective.AllGather(x, axis=0, group_name=group, **UNKNOWN)

    def reduce_scatter(x: Any, reduce_op: str, ways: int, group: str) -> Any:
        return collective.ReduceScatter(x, axis=0, reduce_op=reduce_op, group_name=group, **UNKNOWN)

    def all_to_all(x: Any, received: Sequence[Any], sent: Sequence[Any], group: str) -> Any:
        known = _known(received)
        if known is not None and known == list(sent) and len(set(known)) == 1:
            return collective.AllToAll(x, group_name=group, **UNKNOWN)
        return collective.AllToAll(x, counts(sent), counts(received), group_name=group, **UNKNOWN)

    def counts(numbers: Sequence[Any]) -> Any:
        known = _known(numbers)
        if known is not None:
            return standard.Constant(value_ints=known)
        one = standard.Constant(value_ints=[1])
        return standard.Concat(*[standard.Reshape(number, one) for number in numbers], axis=0)

    def wait(x: Any) -> Any:
        return standard.Identity(x)

    return {
        **exact_numbers(opset),
        functional.ALL_REDUCE: all_reduce,
        functional.ALL_GATHER: all_gather,
        functional.REDUCE_SCATTER: reduce_scatter,
        functional.ALL_TO_ALL: all_to_all,
        functional.WAIT: wait,
    }


def _known(numbers: Sequence[Any]) -> list[int] | None:
    return list(numbers) if all(isinstance(number, int) for number in numbers) else None


def onnx_role(role: Traced, functions: Functions, opset: int | None, ir: int | None) -> onnx.ModelProto:
    """The model of a role: inputs and outputs by their names, state by its names, typed and without data.

    State stands among the inputs, after the user's. ``functions``: those of its trace. Raises ExportError for what has
    no form in that opset.
    """
    wanted = OPSET if opset is None else opset
    _within("opset", wanted, LEAST_OPSET, onnx.defs.onnx_opset_version())
    _within("ir", LEAST_IR if ir is None else ir, LEAST_IR, onnx.IR_VERSION)
    try:
        with without_notes():
            made = torch.onnx.export(
                role.exported, dynamo=True, optimize=False, opset_version=wanted, verbose=False,
                custom_translation_table=translations(wanted),
            )  # fmt: skip
    except Exception as error:  # of many classes, with long messages
        raise ExportError(
            f"torch.onnx cannot write this program in opset {wanted}: {reason_of(error)}\n"
            "Way out: another --opset, or the format pt2."
        ) from error
    assert made is not None
    model = made.model
    if not any(map(_has_graphs, model.graph)):  # whose results may be such identities
        model = common.IdentityEliminationPass()(model).model  # before outputs get some
    model = common.RemoveUnusedNodesPass()(model).model
    for value, (_, entry) in zip(model.graph.inputs, role.inputs, strict=True):
        value.name = input_name(entry)
    _name_outputs(model, role)
    model = common.NameFixPass()(model).model
    for name in [name for name in role.exported.state_dict if name in model.graph.initializers]:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
    if ir is not None:
        model.ir_version = ir
    model.producer_name = "autopar"
    proto: onnx.ModelProto = onnx_ir.to_proto(model)
    functions.add_to(proto, wanted)
    return proto


def _within(name: str, number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        raise ExportError(f"{name} {number}: this exporter writes {name} {least} to {most}")


def _has_graphs(node: onnx_ir.Node) -> bool:
    return any(attribute.type is onnx_ir.AttributeType.GRAPH for attribute in node.attributes.values())


def _name_outputs(model: onnx_ir.Model, role: Traced) -> None:
    """An output that is an input, or another output, passes through an Identity: each has its own name."""
    graph, seen = model.graph, set[int]()
    for place, (value, entry) in enumerate(zip(list(graph.outputs), role.outputs, strict=True)):
        if value.producer() is None or id(value) in seen:
            node = onnx_ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[place] = value = node.outputs[0]
        seen.add(id(value))
        value.name = output_name(entry)
