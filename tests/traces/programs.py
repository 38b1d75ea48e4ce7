"""Small programs of every kind of communication, compiled once for all tests of this folder."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

from autopar.compiler import compile_program
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.plan import Plan

PROGRAMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "data and tensors": ("gpt", "dp=2,tp=2", {}),
    "one rank": ("gpt", "dp=1,tp=1", {}),
    "ZeRO-3": ("gpt", "dp=2", {"zero": 3}),
    "pipeline with ZeRO-1": ("gpt", "pp=2,dp=2", {"zero": 1, "microbatches": 4}),
    "zero bubble": ("gpt", "pp=2", {"schedule": "zb-v", "microbatches": 4}),
    "three stages": ("gpt", "pp=3,tp=2", {"microbatches": 4}),
    "ring": ("llama", "sp=2", {"attention": "ring"}),
    "experts": ("moe", "pp=2,ep=2", {"microbatches": 2}),
}
ROWS = 8


@cache
def compiled(name: str) -> AnyProgram:
    model, mesh, plan = PROGRAMS[name]
    torch.manual_seed(0)
    module = importlib.import_module(f"autopar.models.{model}")
    made = module.build()
    return compile_program(made, Mesh.parse(mesh), Plan(**plan), (), module.example_batch(made, ROWS))
