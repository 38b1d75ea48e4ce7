"""Small models of the architectures that people use, built from the config classes of Hugging Face: ``tiny:llama``.

Weights are random. Sizes divide by 2, 3 and 4, so that a model fits meshes of these; the vocabulary holds all bytes.
"""

from __future__ import annotations

from autopar.errors import near_names
from autopar.zoo import decoders, encoders, experts, state_space, vision
from autopar.zoo.architecture import LENGTH, Architecture
from autopar.zoo.batches import Batch

__all__ = ["ARCHITECTURES", "FAMILIES", "LENGTH", "Architecture", "Batch", "architecture"]

ARCHITECTURES: dict[str, Architecture] = {
    **decoders.ARCHITECTURES,
    **experts.ARCHITECTURES,
    **encoders.ARCHITECTURES,
    **vision.ARCHITECTURES,
    **state_space.ARCHITECTURES,
}
FAMILIES: tuple[str, ...] = tuple(dict.fromkeys(entry.family for entry in ARCHITECTURES.values()))


def architecture(name: str) -> Architecture:
    """The architecture called ``name``. Raises ValueError for an unknown one, with the known names."""
    if name not in ARCHITECTURES:
        there = ", ".join(ARCHITECTURES)
        near = near_names(name, ARCHITECTURES)
        raise ValueError(f"there is no small model 'tiny:{name}'{near}\nWay out: tiny: with one of {there}.")
    return ARCHITECTURES[name]
