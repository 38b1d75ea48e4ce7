"""autopar: splits unmodified PyTorch models over a mesh of devices and shows every collective.

mesh = autopar.Mesh(dp=2, tp=2)
model = autopar.parallelize(model, mesh)
"""

from __future__ import annotations

import sys

if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)] in ("autopar", "-mautopar")
    and not getattr(sys.flags, "safe_path", False)
):
    # python -m autopar: the working directory comes first, and a file there, which may be the directory of a program,
    # could stand for any module of Python or torch
    del sys.path[0]

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.analysis.compare import diff
    from autopar.api import parallelize
    from autopar.checkpoint.checkpoints import Checkpoints, Resumed
    from autopar.checkpoint.weights import LoadedWeights, load_safetensors
    from autopar.checkpoint.written_weights import save_pretrained, save_safetensors
    from autopar.compiled_family import compile_family
    from autopar.compiler import compile_program
    from autopar.data.padding import PaddedBatch, pad_batch
    from autopar.data.parts import BatchesOfRank, part_of_batch
    from autopar.data.token_file import TokenFile
    from autopar.data.token_sources import pack_tokens
    from autopar.exporters.export import export
    from autopar.families.family import Family
    from autopar.frameworks.hugging_face import trainer_class
    from autopar.frameworks.lightning import lightning_arguments
    from autopar.ir.program import PipelinedProgram, Program
    from autopar.module import ParallelModule
    from autopar.pretrained.exported_weights import ExportedWeights, export_weights
    from autopar.pretrained.gathered import gather
    from autopar.pretrained.loading import from_pretrained
    from autopar.program_files.family_file import load_family, save_family
    from autopar.proof.report import Verification
    from autopar.proof.verify import verify
    from autopar.routing.placement import balanced_placement
    from autopar.training.profiling import profile
    from autopar.training.step_record import StepRecord
    from autopar.training.watch import Watch
    from autopar.verification.register_rule import register_rule

from autopar.errors import (
    AutoparError,
    CheckpointError,
    ExportError,
    IndivisibleError,
    InvariantError,
    LaunchError,
    NothingSplitError,
    NumericsError,
    ProgramFileError,
    ProofError,
    RankFailedError,
    SequenceError,
    TraceError,
    UnknownOperatorError,
    WrongRuleError,
    near_names,
)
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.precision import Precision

__version__ = "0.1.0"

# name -> module: what needs torch.export or torch.distributed is imported at first use. No name of a submodule
# here: that would be the module or the function, depending on what was imported first.
_LAZY = {
    "balanced_placement": "routing.placement",
    "BatchesOfRank": "data.parts",
    "Checkpoints": "checkpoint.checkpoints",
    "LoadedWeights": "checkpoint.weights",
    "lightning_arguments": "frameworks.lightning",
    "compile_family": "compiled_family",
    "compile_program": "compiler",
    "export": "exporters.export",
    "Family": "families.family",
    "ExportedWeights": "pretrained.exported_weights",
    "export_weights": "pretrained.exported_weights",
    "diff": "analysis.compare",
    "from_pretrained": "pretrained.loading",
    "gather": "pretrained.gathered",
    "load_family": "program_files.family_file",
    "load_safetensors": "checkpoint.weights",
    "pack_tokens": "data.token_sources",
    "pad_batch": "data.padding",
    "PaddedBatch": "data.padding",
    "parallelize": "api",
    "part_of_batch": "data.parts",
    "ParallelModule": "module",
    "PipelinedProgram": "ir.program",
    "profile": "training.profiling",
    "Program": "ir.program",
    "Resumed": "checkpoint.checkpoints",
    "register_rule": "verification.register_rule",
    "save_family": "program_files.family_file",
    "save_pretrained": "checkpoint.written_weights",
    "save_safetensors": "checkpoint.written_weights",
    "StepRecord": "training.step_record",
    "TokenFile": "data.token_file",
    "Verification": "proof.report",
    "verify": "proof.verify",
    "Watch": "training.watch",
    "trainer_class": "frameworks.hugging_face",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'autopar' has no attribute '{name}'{near_names(name, __all__)}")
    from importlib import import_module

    return getattr(import_module(f"autopar.{_LAZY[name]}"), name)


__all__ = [
    "AutoparError",
    "BatchesOfRank",
    "CheckpointError",
    "Checkpoints",
    "ExportError",
    "ExportedWeights",
    "Family",
    "IndivisibleError",
    "InvariantError",
    "LaunchError",
    "LoadedWeights",
    "Mesh",
    "NothingSplitError",
    "NumericsError",
    "PaddedBatch",
    "ParallelModule",
    "PipelinedProgram",
    "Plan",
    "Precision",
    "Program",
    "ProgramFileError",
    "ProofError",
    "RankFailedError",
    "Resumed",
    "SequenceError",
    "StepRecord",
    "TokenFile",
    "TraceError",
    "UnknownOperatorError",
    "Verification",
    "Watch",
    "WrongRuleError",
    "__version__",
    "balanced_placement",
    "compile_family",
    "compile_program",
    "diff",
    "export",
    "export_weights",
    "from_pretrained",
    "gather",
    "lightning_arguments",
    "load_family",
    "load_safetensors",
    "pack_tokens",
    "pad_batch",
    "parallelize",
    "part_of_batch",
    "profile",
    "register_rule",
    "save_family",
    "save_pretrained",
    "save_safetensors",
    "trainer_class",
    "verify",
]
