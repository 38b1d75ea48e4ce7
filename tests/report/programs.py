"""Finished programs of small models, each made once."""

from __future__ import annotations

from functools import cache
from typing import Any

from autopar.compiler import compile_program
from autopar.ir.batch import data_ways
from autopar.ir.program import AnyProgram
from autopar.mesh import Mesh
from autopar.plan import Plan
from autopar.report.collect import report_of
from autopar.report.document import Module, Parameter, Report
from autopar.zoo.named import named_model


@cache
def program_of(model: str, mesh: str, **choices: Any) -> AnyProgram:
    on = Mesh.parse(mesh)
    example = named_model(model, ways=data_ways(on))
    return compile_program(example.model, on, Plan(**choices), (), example.batch)


@cache
def reported(model: str, mesh: str, **choices: Any) -> Report:
    return report_of(model, program_of(model, mesh, **choices))


def parameters(module: Module) -> list[Parameter]:
    """All that the tree shows."""
    return [*module.parameters, *(one for child in module.children for one in parameters(child))]
