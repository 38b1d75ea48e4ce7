"""The ONNX domain ``autopar.collective``, version 1: schemas with shape inference. docs/exports.md is its reference.

Every operator has the attributes ``group`` (the ranks that take part, in order), ``group_name`` and ``collective_id``,
which all members have alike. ``group`` of Send and Recv is the sender and the receiver.

    AllReduce(x) -> y           reduce_op: sum, max, min
    AllGather(x) -> y           the parts of the group one after the other along axis
    ReduceScatter(x) -> y       reduce_op; of the whole along axis, the part of this rank's position in the group
    AllToAll(x, send, receive) -> y     rows of dim 0: send[i] to member i, receive[i] from it; without counts, equally
    Broadcast(x) -> y           that of the member at position root
    Send(x)                     to group[1]
    Recv() -> y                 from group[0]; dtype (of TensorProto) and shape
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext

DOMAIN, VERSION = "autopar.collective", 1
REDUCTIONS = ("sum", "max", "min")
COUNTED = {"send": 1, "receive": 2}  # the inputs of an AllToAll of unequal parts

_WHOLE_NUMBERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
TYPES = [f"tensor({name})" for name in ("float", "double", "float16", "bfloat16", "bool", *_WHOLE_NUMBERS)]
_KIND = OpSchema.AttrType
_MEMBERS = {"group": _KIND.INTS, "group_name": _KIND.STRING, "collective_id": _KIND.INT}


def _same(context: InferenceContext) -> None:
    if (kind := context.get_input_type(0)) is not None:
        context.set_output_type(0, kind)


def _resized(times: Callable[[int, int], int]) -> Callable[[InferenceContext], None]:
    """``times``: (size of the dim, ranks of the group) -> size of that of the result."""

    def infer(context: InferenceContext) -> None:
        kind, axis, group = context.get_input_type(0), context.get_attribute("axis"), context.get_attribute("group")
        if kind is None or axis is None or group is None:
            return
        found = onnx.TypeProto()
        found.CopyFrom(kind)
        if axis.i < len(found.tensor_type.shape.dim):
            dim = found.tensor_type.shape.dim[axis.i]
            if dim.HasField("dim_value"):
                dim.dim_value = times(dim.dim_value, len(group.ints))
            else:
                dim.Clear()
        context.set_output_type(0, found)

    return infer


def _exchanged(context: InferenceContext) -> None:
    """Of unequal parts the first size is known at run time only."""
    kind = context.get_input_type(0)
    if kind is None:
        return
    found = onnx.TypeProto()
    found.CopyFrom(kind)
    if context.get_num_inputs() > 1 and found.tensor_type.shape.dim:
        found.tensor_type.shape.dim[0].Clear()
    context.set_output_type(0, found)


def _received(context: InferenceContext) -> None:
    dtype, shape = context.get_attribute("dtype"), context.get_attribute("shape")
    if dtype is not None and shape is not None:
        context.set_output_type(0, onnx.helper.make_tensor_type_proto(dtype.i, list(shape.ints)))


def _schema(
    name: str,
    attributes: Mapping[str, Any],
    infer: Callable[[InferenceContext], None] | None,
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] = ("y",),
) -> OpSchema:
    optional = OpSchema.FormalParameterOption.Optional
    taken = [
        OpSchema.FormalParameter(given, "T")
        if given == "x"
        else OpSchema.FormalParameter(given, "tensor(int64)", param_option=optional)
        for given in inputs
    ]
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        (__doc__ or "").partition("\n\n")[2],
        inputs=taken,
        outputs=[OpSchema.FormalParameter(result, "T") for result in outputs],
        type_constraints=[("T", TYPES, "any tensor")],
        attributes=[OpSchema.Attribute(key, kind, "") for key, kind in {**_MEMBERS, **attributes}.items()],
    )
    if infer is not None:
        schema.set_type_and_shape_inference_function(infer)
    return schema


SCHEMAS = {
    schema.name: schema
    for schema in (
        _schema("AllReduce", {"reduce_op": _KIND.STRING}, _same),
        _schema("AllGather", {"axis": _KIND.INT}, _resized(lambda size, ways: size * ways)),
        _schema(
            "ReduceScatter", {"axis": _KIND.INT, "reduce_op": _KIND.STRING}, _resized(lambda size, ways: size // ways)
        ),
        _schema("AllToAll", {}, _exchanged, ("x", *COUNTED)),
        _schema("Broadcast", {"root": _KIND.INT}, _same),
        _schema("Send", {}, None, outputs=()),
        _schema("Recv", {"dtype": _KIND.INT, "shape": _KIND.INTS}, _received, inputs=()),
    )
}


def register() -> None:
    """Let this process's onnx know the domain: its checker and its shape inference, and onnxscript."""
    for name, schema in SCHEMAS.items():
        if not onnx.defs.has(name, VERSION, DOMAIN):
            onnx.defs.register_schema(schema)
