"""The messages of a Chakra execution trace, made from a table: no generated code, and no copy of the schema's file.

Source: mlcommons/chakra, ``schema/protobuf/et_def.proto`` (2026). Field numbers and types are those of that file; of
the values of an attribute, those that readers of traces take.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

PACKAGE, VERSION = "ChakraProtoMsg", "0.0.4"

# message -> field -> (number, type); a type with "*" repeats, one with "|" is one of the values of a oneof
MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "BoolList": {"values": (1, "bool*")},
    "AttributeProto": {
        "name": (1, "string"),
        "doc_string": (2, "string"),
        "double_val": (3, "double|"),
        "int32_val": (7, "int32|"),
        "int64_val": (9, "int64|"),
        "uint32_val": (11, "uint32|"),
        "uint64_val": (13, "uint64|"),
        "bool_val": (27, "bool|"),
        "bool_list": (28, "BoolList|"),
        "string_val": (29, "string|"),
    },
    "GlobalMetadata": {"version": (1, "string"), "attr": (2, "AttributeProto*")},
    "IOInfo": {"values": (1, "string"), "shapes": (2, "string"), "types": (3, "string")},
    "Node": {
        "id": (1, "uint64"),
        "name": (2, "string"),
        "type": (3, "NodeType"),
        "ctrl_deps": (4, "uint64*"),
        "data_deps": (5, "uint64*"),
        "start_time_micros": (6, "uint64"),
        "duration_micros": (7, "uint64"),
        "inputs": (8, "IOInfo"),
        "outputs": (9, "IOInfo"),
        "attr": (10, "AttributeProto*"),
    },
}
NODE_TYPES = {
    "INVALID_NODE": 0, "METADATA_NODE": 1, "MEM_LOAD_NODE": 2, "MEM_STORE_NODE": 3, "COMP_NODE": 4,
    "COMM_SEND_NODE": 5, "COMM_RECV_NODE": 6, "COMM_COLL_NODE": 7,
}  # fmt: skip
COMMUNICATION_TYPES = {
    "ALL_REDUCE": 0, "REDUCE": 1, "ALL_GATHER": 2, "GATHER": 3, "SCATTER": 4, "BROADCAST": 5, "ALL_TO_ALL": 6,
    "REDUCE_SCATTER": 7, "REDUCE_SCATTER_BLOCK": 8, "BARRIER": 9,
}  # fmt: skip
ENUMS = {"NodeType": NODE_TYPES, "CollectiveCommType": COMMUNICATION_TYPES}


@cache
def schema() -> Any:
    """The message classes, by name: ``schema().Node(id=1)``. Raises ValueError without the package protobuf."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ModuleNotFoundError as error:
        raise ValueError("Chakra traces need protobuf\nWay out: pip install 'autopar[export]'") from error
    file = descriptor_pb2.FileDescriptorProto(name="autopar/et_def.proto", package=PACKAGE, syntax="proto3")
    for name, numbers in ENUMS.items():
        made = file.enum_type.add(name=name)
        for value, number in numbers.items():
            made.value.add(name=value, number=number)
    for name, fields in MESSAGES.items():
        _add_message(file.message_type.add(name=name), fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{PACKAGE}.{name}") for name in MESSAGES}
    return SimpleNamespace(**{name: message_factory.GetMessageClass(one) for name, one in found.items()})


def _add_message(message: Any, fields: dict[str, tuple[int, str]]) -> None:
    for name, (number, text) in fields.items():
        kind = text.rstrip("*|")
        field = message.field.add(name=name, number=number)
        field.label = field.LABEL_REPEATED if text.endswith("*") else field.LABEL_OPTIONAL
        if text.endswith("|"):
            if not message.oneof_decl:
                message.oneof_decl.add(name="value")
            field.oneof_index = 0
        if kind in MESSAGES or kind in ENUMS:
            field.type = field.TYPE_ENUM if kind in ENUMS else field.TYPE_MESSAGE
            field.type_name = f".{PACKAGE}.{kind}"
        else:
            field.type = getattr(field, f"TYPE_{kind.upper()}")
