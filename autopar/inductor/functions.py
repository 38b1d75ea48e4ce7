"""The functions of a rank program whose regions Inductor compiles; collectives stay lines of Python around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.codegen.python import RankFunction, compile_source, emit, emit_sized
from autopar.codegen.regions import regions_of, with_regions
from autopar.errors import AutoparError
from autopar.inductor.compiled_region import compiled_region
from autopar.inductor.sized_region import sized_region
from autopar.inductor.torch_inductor import compiler_missing, takes
from autopar.ir.program import Program


def regional_function(name: str, graph: fx.Graph, program: Program, *, labelled: bool = False) -> RankFunction:
    """The function ``name`` of ``graph``, a graph of ``program``; see :func:`autopar.codegen.python.emit`.

    Raises InvariantError where it cannot be written as Python.
    """
    regional = with_regions(graph, program.mesh, takes)
    function = compile_source(emit({name: regional}, program, labelled=labelled), name)
    bound = function.__globals__
    for region in regions_of(regional):
        bound[region.__name__] = compiled_region(region, bound[region.__name__])
    return function


def regional_sized(
    name: str, graph: fx.Graph, program: Program, *, labelled: bool = False
) -> tuple[RankFunction, tuple[Any, ...]]:
    """As :func:`regional_function`, for a graph of a family's template; see :func:`autopar.codegen.python.emit_sized`.

    Also gives the expressions whose values the function takes.
    """
    regional = with_regions(graph, program.mesh, takes)
    source, sizes = emit_sized(name, regional, program, labelled=labelled)
    function = compile_source(source, name)
    bound = function.__globals__
    for region in regions_of(regional):
        own, python = sizes[region.__name__], bound[region.__name__]
        made = sized_region(region, python, own, program.mesh) if own else compiled_region(region, python)
        bound[region.__name__] = made
    return function, sizes[name]


def regional_source(name: str, graph: fx.Graph, program: Program) -> str:
    """The Python of ``graph`` with its regions as functions, each of which Inductor compiles."""
    return emit({name: with_regions(graph, program.mesh, takes)}, program)


def refuse_without_compiler(device: torch.device) -> None:
    """Raise AutoparError where nothing can be compiled for ``device`` on this machine.

    That is no reason to run Python instead: ranks that have a compiler round otherwise, and what they hold alike, such
    as replicated parameters, would drift apart.
    """
    missing = compiler_missing(device)
    if missing:
        raise AutoparError(
            f'Plan(compile="inductor") needs {missing}, which this machine does not have\n'
            'Way out: install it on every machine of the launch, or Plan(compile="python").'
        )
