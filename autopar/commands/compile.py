"""``autopar compile``: write the program of a model to a directory, for ``autopar run``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autopar.commands.batch_sizes import BatchSizes, sizes_json, sizes_text
from autopar.commands.bundles import expanded
from autopar.commands.memory_tables import MemoryChoices
from autopar.commands.options import Json, MeshText, ModelChoices, ModelName, read_mesh
from autopar.commands.plan_options import PlanChoices
from autopar.commands.tables import held_json, print_json, stderr, stdout, traffic_json
from autopar.mesh import PIPELINE, Mesh
from autopar.plan import Plan

if TYPE_CHECKING:  # which import torch
    from autopar.families.family import Family
    from autopar.ir.program import AnyProgram
    from autopar.zoo.named import Example


@expanded
def compile_command(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="a new directory, or a program's")],
    mesh: MeshText = "dp=2,tp=2",
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    sizes: BatchSizes,
    memory: MemoryChoices,
    as_json: Json = False,
) -> None:
    """Write the program of MODEL on a mesh to DIR: the graphs as text, constants, a manifest with every layout.

    autopar run and autopar train --program start from it. Weights are not part of it. stage0/rank.py is what the ranks
    run, to be read; of a pipeline one for each stage, and in schedule/ what each pipeline rank does in order.
    With --to-length or --to-batch a family of programs, for all batches between these sizes.
    """
    from autopar.analysis.footprint import held, sent
    from autopar.calls.calls import Signature
    from autopar.commands.run import refuse_too_large
    from autopar.compiler import compile_program
    from autopar.ir.batch import data_ways
    from autopar.ir.traffic import size_text
    from autopar.pipeline.microbatches import first_part
    from autopar.program_files.family_file import save_family
    from autopar.program_files.program_file import save
    from autopar.proof.verify import prove

    on = read_mesh(mesh)
    example = choices.example(model, data_ways(on), shown=not as_json)
    with stderr().status(f"making the program of {model} on {on}"):
        batch_by_signature = Signature(example.model.forward).call((), example.batch).kwargs
        if sizes.are_several:
            family = _family(model, example, on, plan.plan(), choices, sizes)
            program = family.first_program
            save_family(family, output, extra_files=dict(_to_read(program)))
        else:
            family, batch = None, first_part(batch_by_signature, on, plan.plan())
            program = compile_program(example.model, on, plan.plan(), (), batch)
            if program.plan.verify:
                prove(example.model, program, (), batch)
            save(program, output, extra_files=dict(_to_read(program)))
    files = {path.relative_to(output).as_posix(): path.stat().st_size for path in output.rglob("*") if path.is_file()}
    if as_json:
        parts = {"parameters": held_json(held(program)), "traffic": traffic_json(sent(program))}
        parts |= {"family": sizes_json(family)} if family is not None else {}
        parts |= memory.document(program, batch_by_signature)
        print_json({"model": model, "mesh": dict(on.axes), "directory": str(output), "files": files, **parts})
        return
    for name, size in sorted(files.items()):
        print(f"{output / name}  {size_text(size)}")
    print(*(["", sizes_text(family)] if family is not None else []), sep="\n")
    stdout().print(*memory.tables(program, batch_by_signature), sep="\n")
    try:
        refuse_too_large(program, random=True)
        print(f"to run it: autopar run {output}")
    except ValueError as problem:
        print(str(problem).partition("\n")[0])


def _family(model: str, example: Example, mesh: Mesh, plan: Plan, choices: ModelChoices, sizes: BatchSizes) -> Family:
    from autopar.calls.calls import Signature
    from autopar.compiled_family import compile_family
    from autopar.ir.batch import data_ways
    from autopar.pipeline.microbatches import first_part

    signature = Signature(example.model.forward)
    batches = sizes.batches(example, choices, model, data_ways(mesh))
    calls = [first_part(signature.call((), batch).kwargs, mesh, plan) for batch in batches]
    return compile_family(example.model, mesh, plan, calls)


def _to_read(program: AnyProgram) -> Iterator[tuple[str, str]]:
    """Files for people: relative path and content."""
    from autopar.codegen.python import emit
    from autopar.ir.program import PipelinedProgram

    for number, stage in enumerate(program.parts):
        yield f"stage{number}/rank.py", emit(stage.rank(0).graphs, stage)
    for place, rank in enumerate(program.mesh.group(0, PIPELINE) if isinstance(program, PipelinedProgram) else ()):
        yield f"schedule/rank{place:03}.txt", program.rank(rank).instructions
