"""A reader of Chakra traces that knows protobuf's wire format and the fields of et_def.proto, and nothing of ours.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARINT, I64, LEN, I32 = 0, 1, 2, 5
TYPES = {1: "METADATA", 2: "LOAD", 3: "STORE", 4: "COMP", 5: "SEND", 6: "RECV", 7: "COLL"}
# the values of an attribute: field -> name; bool, string and the integers that are no zigzag
SIGNED, UNSIGNED, BOOL, STRING = {7, 9}, {11, 13}, 27, 29


@dataclass
class Node:
    id: int
    name: str
    type: str
    control: tuple[int, ...]
    data: tuple[int, ...]
    micros: int
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> tuple[int, ...]:
        return (*self.control, *self.data)


def read(path: Path) -> tuple[dict[str, Any], list[Node]]:
    """The attributes of the metadata with its version, and the nodes."""
    head, *nodes = delimited(path.read_bytes())
    about = fields(head)
    return {"version": text(about[1][0]), **attributes(about[2])}, [node(one) for one in nodes]


def delimited(content: bytes) -> list[bytes]:
    """The messages in a file, each after its length."""
    found, at = [], 0
    while at < len(content):
        length, at = varint(content, at)
        assert at + length <= len(content), "the file ends within a message"
        found.append(content[at : at + length])
        at += length
    return found


def varint(content: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (content[at] & 0x7F) << shift
        at += 1
        if not content[at - 1] & 0x80:
            return number, at
        shift += 7


def fields(message: bytes) -> dict[int, list[Any]]:
    """Field number -> its values: integers, or bytes."""
    found: dict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = varint(message, at)
        elif kind == LEN:
            length, at = varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            size = {I64: 8, I32: 4}[kind]
            value, at = message[at : at + size], at + size
        found[number].append(value)
    return found


def node(message: bytes) -> Node:
    about = fields(message)
    return Node(
        about[1][0],
        text(about[2][0]),
        TYPES[about[3][0]],
        packed(about[4]),
        packed(about[5]),
        about[7][0] if about[7] else 0,
        attributes(about[10]),
    )


def packed(values: list[Any]) -> tuple[int, ...]:
    """A repeated integer: packed or not."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        at = 0
        while at < len(value):
            number, at = varint(value, at)
            found.append(number)
    return tuple(found)


def attributes(messages: list[bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for message in messages:
        about = fields(message)
        ((number, (value,)),) = [(key, values) for key, values in about.items() if key > 2]
        name = text(about[1][0])
        if number in SIGNED:
            (value,) = struct.unpack("<q", struct.pack("<Q", value))
        elif number == STRING:
            value = text(value)
        elif number == BOOL:
            value = bool(value)
        else:
            assert number in UNSIGNED, f"{name} has a value of field {number}"
        found[name] = value
        found[f"field of {name}"] = number
    return found


def text(value: bytes) -> str:
    return value.decode("utf-8")
