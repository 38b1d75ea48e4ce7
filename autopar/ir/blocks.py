"""The repeated blocks of a model, found in its graph: the layers of a transformer, the stages of a network."""

from __future__ import annotations

from autopar.ir.node import Node, origin


def block_of(node: Node) -> str:
    """The block of ``node``: its module path up to the first number, ``model.layers.3``.

    Outside of numbered modules (embeddings, heads), each module is a block.
    """
    parts = origin(node).module.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return ".".join(parts)


def is_repeated(block: str) -> bool:
    """Whether ``block`` is one of a numbered series."""
    return block.rpartition(".")[2].isdigit()
