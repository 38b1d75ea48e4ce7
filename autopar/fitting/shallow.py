"""A model with fewer of its repeated blocks, which compiles in a second; what is counted grows with the blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # of a config, which some models look at


@dataclass(frozen=True)
class Depth:
    """``blocks`` alike in the list ``name`` of a model; 0: it has no such list, and is always whole."""

    name: str
    blocks: int


def depth_of(model: nn.Module) -> Depth:
    """The list of blocks that has most of the parameters, if all of them have the same tensors."""
    found = max(_lists(model), key=lambda entry: entry[1], default=("", 0, 0))
    return Depth(found[0], found[2])


def _lists(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 2:
            shapes = [sorted((n, tuple(p.shape)) for n, p in block.named_parameters()) for block in module]
            size = sum(p.numel() for p in module.parameters())
            if all(shape == shapes[0] for shape in shapes) and size:
                yield name, size, len(module)


def shallow(model: nn.Module, depth: Depth, blocks: int) -> nn.Module:
    """``model`` with only the first ``blocks``. It shares nothing with ``model``."""
    if not depth.blocks or blocks >= depth.blocks:
        return model
    rest = list(model.get_submodule(depth.name).children())[blocks:]
    known = {id(tensor): tensor for block in rest for tensor in (*block.parameters(), *block.buffers())}
    made = copy.deepcopy(model, dict(known))  # what is left out is not copied
    short = made.get_submodule(depth.name)
    assert isinstance(short, nn.ModuleList)
    del short[blocks:]
    config = getattr(made, "config", None)
    for field in COUNTS:
        if getattr(config, field, None) == depth.blocks:
            setattr(config, field, blocks)
    return made
