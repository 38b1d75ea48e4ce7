"""A small network, its program, and its ONNX files with what their verification takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autopar import Mesh, Plan
from autopar.compiler import compile_program
from autopar.exporters.job import Job
from autopar.exporters.rank_module import parts_of
from autopar.exporters.traced import traced
from autopar.exporters.whole_tensors import WholeTensors
from autopar.ir.program import AnyProgram

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from autopar.exporters import onnx_file
from autopar.exporters.verify import Parts

ALLOWED = 1e-5  # of the largest element, in float32


class Network(nn.Module):
    """Small, with a loss over a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(32, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.down(torch.relu(self.up(self.table(ids)))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def network(mesh: Mesh, plan: Plan | None = None, *, source: bool = False) -> tuple[AnyProgram, nn.Module]:
    """Its program, and the model. ``source``: with its source, of which exports then write logical.onnx too."""
    torch.manual_seed(0)
    model = Network()
    ids = torch.randint(32, (4, 8))
    batch = {"ids": ids, "labels": ids.flip(1)}
    program = compile_program(model, mesh, plan or Plan(check_numerics=False), (), batch)
    return program if source else replace(program, source=None), model


def written(program: AnyProgram, model: nn.Module, folder: Path) -> tuple[Job, Parts]:
    """The files in ``folder``, without logical.onnx, and what their verification takes."""
    folder.mkdir(exist_ok=True)
    program = replace(program, source=None)
    ranks = tuple(range(program.mesh.world_size))
    job = Job(program, folder, ranks, "safetensors", WholeTensors.of(model))
    onnx_file.write(job)
    roles = {}
    for part in parts_of(program, ranks):
        if part.role not in roles:
            roles[part.role] = traced(part)
    return job, [(part, roles[part.role]) for part in parts_of(program, ranks)]
