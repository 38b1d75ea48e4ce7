"""What a writer of a format is asked for, and what it gives back for the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.exporters.dynamic_sizes import DynamicSizes
from autopar.exporters.whole_tensors import WholeTensors
from autopar.ir.program import AnyProgram


@dataclass(frozen=True)
class Options:
    """Of one format or another.

    Attributes:
        opset, ir: versions of an ONNX file; None for the exporter's own.
        dialect: of the collectives in ONNX files: ``autopar`` or ``tensorrt``.
        verify: whether what was written is run, all ranks together, against the program.
        training: whether a training step is written, forward and backward, where the format can hold one.
    """

    opset: int | None = None
    ir: int | None = None
    dialect: str = "autopar"
    verify: bool = False
    training: bool = False


@dataclass(frozen=True)
class Job:
    """``directory``: an empty one for this format, which is moved to its place when all is written.

    Attributes:
        ranks: of the mesh, those whose files are wanted.
        weights: ``safetensors``, ``reference`` or ``none``; see docs/exports.md.
        tensors: the whole parameters and buffers; None where they are not given.
        sizes: those of the family that is written; None for a program of fixed sizes.
        members: of the family, programs at some of its sizes.
        told: called with a few words before each piece of work, for people who wait.
    """

    program: AnyProgram
    directory: Path
    ranks: tuple[int, ...]
    weights: str = "none"
    tensors: WholeTensors | None = None
    options: Options = field(default_factory=Options)
    sizes: DynamicSizes | None = None
    members: tuple[AnyProgram, ...] = ()
    told: Callable[[str], None] = lambda words: None


Writer = Callable[[Job], Mapping[str, Any]]  # its entry in the manifest, as JSON
