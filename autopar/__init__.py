"""autopar: splits unmodified PyTorch models over a mesh of devices and shows every collective.

    mesh = autopar.Mesh(dp=2, tp=2)
    model = autopar.parallelize(model, mesh)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopar.errors import (
    AutoparError,
    CheckpointError,
    IndivisibleError,
    InvariantError,
    LaunchError,
    NumericsError,
    ProgramFileError,
    RankFailedError,
    TraceError,
    UnknownOperatorError,
    WrongRuleError,
)
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.precision import Precision

if TYPE_CHECKING:
    from autopar.checkpoint import Checkpoints, Resumed
    from autopar.driver import compile_program, parallelize
    from autopar.module import ParallelModule
    from autopar.program import Program
    from autopar.rules import register_rule
    from autopar.weights_files import LoadedWeights, load_safetensors, save_safetensors

__version__ = "0.1.0"

# name -> module: what needs torch.export or torch.distributed is imported at first use. No name of a submodule here:
# autopar.trace is the module, whichever was imported first.
_LAZY = {
    "Checkpoints": "checkpoint",
    "LoadedWeights": "weights_files",
    "compile_program": "driver",
    "load_safetensors": "weights_files",
    "parallelize": "driver",
    "ParallelModule": "module",
    "Program": "program",
    "Resumed": "checkpoint",
    "register_rule": "rules",
    "save_safetensors": "weights_files",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'autopar' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"autopar.{_LAZY[name]}"), name)


__all__ = [
    "AutoparError",
    "CheckpointError",
    "Checkpoints",
    "IndivisibleError",
    "InvariantError",
    "LaunchError",
    "LoadedWeights",
    "Mesh",
    "NumericsError",
    "ParallelModule",
    "Plan",
    "Precision",
    "Program",
    "ProgramFileError",
    "RankFailedError",
    "Resumed",
    "TraceError",
    "UnknownOperatorError",
    "WrongRuleError",
    "__version__",
    "compile_program",
    "load_safetensors",
    "parallelize",
    "register_rule",
    "save_safetensors",
]
