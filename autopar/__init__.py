"""autopar: splits unmodified PyTorch models over a mesh of devices and shows every collective.

    mesh = autopar.Mesh(dp=2, tp=2)
    model = autopar.parallelize(model, mesh)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopar.errors import (
    AutoparError,
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

if TYPE_CHECKING:
    from autopar.driver import compile_program, parallelize
    from autopar.module import ParallelModule
    from autopar.program import Program
    from autopar.rules import register_rule

__version__ = "0.1.0"

# name -> module: what needs torch.export or torch.distributed is imported at first use. No name of a submodule here:
# autopar.trace is the module, whichever was imported first.
_LAZY = {
    "compile_program": "driver",
    "parallelize": "driver",
    "ParallelModule": "module",
    "Program": "program",
    "register_rule": "rules",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'autopar' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"autopar.{_LAZY[name]}"), name)


__all__ = [
    "AutoparError",
    "IndivisibleError",
    "InvariantError",
    "LaunchError",
    "Mesh",
    "NumericsError",
    "ParallelModule",
    "Plan",
    "Program",
    "ProgramFileError",
    "RankFailedError",
    "TraceError",
    "UnknownOperatorError",
    "WrongRuleError",
    "__version__",
    "compile_program",
    "parallelize",
    "register_rule",
]
