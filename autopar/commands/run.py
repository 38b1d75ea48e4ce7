"""``autopar run``: a saved program on real processes, without the source code of its model."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autopar.commands.options import Json, Seed
from autopar.commands.orphans import end_with_launcher
from autopar.commands.tables import print_json, stdout, table, traffic_json, traffic_table
from autopar.errors import ProgramFileError
from autopar.mesh import PIPELINE
from autopar.plain_files import open_plain
from autopar.training.ranks import is_first

if TYPE_CHECKING:  # which import torch
    import torch
    from torch import Tensor, nn

    from autopar.communication.connect import Connection
    from autopar.ir.node import Value
    from autopar.ir.program import AnyProgram, PipelinedProgram, Program

DEVIATION = 0.02  # of random weights
Allowed = Annotated[list[str] | None, typer.Option("--allow", metavar="LIBRARY", help="of operators: mylib")]
RUNS = 2
PROCESS = 200 << 20  # bytes of a process that has imported torch


def run(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="what autopar compile wrote")],
    weights: Annotated[Path | None, typer.Option(help="safetensors file, parameter names as in the model")] = None,
    inputs: Annotated[Path | None, typer.Option(help="safetensors file, whole inputs by name")] = None,
    output: Annotated[Path | None, typer.Option(help="safetensors file for the whole outputs")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is one for every rank")] = "cpu",
    seed: Seed = 0,
    operators: Allowed = None,
    as_json: Json = False,
) -> None:
    """Run the forward pass of a saved program over its mesh; weights and inputs that are not given are random.

    By itself it starts one process per rank (torchrun). Nothing in DIR is executed but known operators.
    """
    import safetensors.torch
    import torch.distributed as dist

    from autopar.commands.launch import is_rank, relaunch
    from autopar.commands.this_machine import device_of_rank, refuse_ranks
    from autopar.communication.connect import connect
    from autopar.program_files.program_file import FAULTS

    program = _program(directory, operators or (), inputs)
    refuse_too_large(program, random=weights is None)
    where = device_of_rank(device, program.mesh.world_size)
    if program.mesh.world_size > 1 and not is_rank():
        refuse_ranks(program.mesh.world_size, where)
        relaunch(program.mesh.world_size, sys.argv[1:])
        return
    if is_rank():
        end_with_launcher()
    try:
        connection = connect(program.mesh, program.plan.timeout, where)
        found, seconds = _forward(program, connection, _read(weights), _read(inputs), seed)
    except FAULTS as error:  # a program that was written by something else than autopar
        raise ProgramFileError(f"the program in {directory} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not is_first():
        return
    if output is not None:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in found.items()}, output)
    traffic = connection.comm.traffic
    outputs = [{"name": name, "shape": list(x.shape), "mean": float(x.double().mean())} for name, x in found.items()]
    if as_json:
        document = {"mesh": dict(program.mesh.axes), "outputs": outputs, "seconds": round(seconds, 3)}
        print_json({**document, "traffic": traffic_json(traffic, RUNS)})
        return
    rows = [(str(entry["name"]), str(entry["shape"]), f"{entry['mean']:.6g}") for entry in outputs]
    console = stdout()
    console.print(table(f"{directory} on {program.mesh}", ("output", "shape", "mean"), rows))
    console.print(traffic_table("sent by rank 0", traffic, RUNS))
    console.print(f"{seconds:.2f} s")


def _program(directory: Path, operators: Sequence[str], inputs: Path | None) -> AnyProgram:
    """That of the directory; of a family the one for the sizes of ``inputs``, or for the first sizes."""
    from autopar.ir.node import value
    from autopar.ir.tables import InputKind
    from autopar.program_files.family_file import holds_family, load_family, member_for
    from autopar.program_files.program_file import load

    if not holds_family(directory):
        return load(directory, operators=operators)
    family = load_family(directory, operators=operators)
    first, given = family.first_program, _read(inputs)
    expected = [(entry.target, value(node).shape) for node, entry in first.placeholders(InputKind.INPUT)]
    return member_for(family, [given[name].shape if name in given else shape for name, shape in expected])


def _forward(
    program: AnyProgram, connection: Connection, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Tensor], float]:
    """Whole outputs by name, and the seconds of the last run (the first compiles)."""
    import torch
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from autopar.ir.program import PipelinedProgram

    generator = torch.Generator().manual_seed(seed)
    root = module_of(program, weights, generator).to(connection.comm.device)
    given = (root, connection, inputs, generator, seed)
    run = _pipeline(program, *given) if isinstance(program, PipelinedProgram) else _executable(program, *given)
    with torch.no_grad():
        for _ in range(RUNS):
            start = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - start
    leaves = [(pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(result)[0]]
    found = {name.strip(".[]'"): _whole(leaf) if isinstance(leaf, Tensor) else None for name, leaf in leaves}
    if isinstance(program, PipelinedProgram):
        found = _from_all_stages(found, connection)
    return {name: tensor for name, tensor in found.items() if tensor is not None}, seconds


def _executable(
    program: Program,
    root: nn.Module,
    connection: Connection,
    inputs: Mapping[str, Tensor],
    generator: torch.Generator,
    seed: int,
) -> Callable[[], Any]:
    from autopar.runtime.execute import Executable
    from autopar.weights.parameters import Weights

    given = _inputs(program, inputs, generator, connection.comm.device)
    Weights(root, connection).lay_out(program)
    executable = Executable(program, root, connection)
    return lambda: executable.run(given, seed)


def _pipeline(
    program: PipelinedProgram,
    root: nn.Module,
    connection: Connection,
    inputs: Mapping[str, Tensor],
    generator: torch.Generator,
    seed: int,
) -> Callable[[], Any]:
    """All microbatches: from the given inputs, else random ones, each as large as the first."""
    from autopar.pipeline import microbatches
    from autopar.runtime.execute_pipeline import PipelineExecutable
    from autopar.weights.parameters import Weights

    plan = replace(program.plan, inputs="global")
    parts: Sequence[Mapping[str, Tensor]] = [{}] * plan.microbatches
    rows = [1] * plan.microbatches
    if inputs:
        parts = microbatches.parts((), inputs, program.mesh, plan)
        rows = microbatches.rows(inputs, parts, plan)
    where = connection.comm.device
    batches = [_inputs(program.of_rows(n == rows[0]), part, generator, where) for n, part in zip(rows, parts)]
    Weights(root, connection).lay_out(program)
    executable = PipelineExecutable(program, root, connection)
    return lambda: executable.run(batches, rows, seed)


def _inputs(
    program: AnyProgram, given: Mapping[str, Tensor], generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    from autopar.ir.node import value
    from autopar.ir.tables import InputKind

    below = _least_rows(program)
    entries = program.placeholders(InputKind.INPUT)
    return [_tensor(entry.target, value(node), given, generator, below).to(device) for node, entry in entries]


def _from_all_stages(found: dict[str, Tensor | None], connection: Connection) -> dict[str, Tensor | None]:
    """On rank 0, the values that any stage has returned."""
    import torch.distributed as dist

    stages: list[dict[str, Tensor | None]] | None = None
    if connection.mesh.world_size > 1:
        stages = [{} for _ in range(connection.mesh.world_size)] if is_first() else None
        first = not any(place for axis, place in connection.comm.coordinates.items() if axis != PIPELINE)
        dist.gather_object(found if first else {}, stages)
    for other in stages or ():
        found |= {name: tensor for name, tensor in other.items() if tensor is not None}
    return found


def module_of(program: AnyProgram, weights: Mapping[str, Tensor], generator: torch.Generator) -> nn.Module:
    """Modules that hold the program's parameters and buffers under their names; they compute nothing themselves."""
    from torch import nn

    from autopar.ir.node import value
    from autopar.ir.tables import InputKind

    root = nn.Module()
    for node, entry in program.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
        names = (entry.target, *entry.aliases)
        known = {**program.made_buffers, **weights}
        found = next((known[name] for name in names if name in known), None)
        if found is None and weights:
            raise ProgramFileError(f"--weights has no tensor '{entry.target}'")
        tensor = _tensor(entry.target, value(node), {} if found is None else {entry.target: found}, generator, 1)
        if entry.kind is InputKind.PARAMETER:
            tensor = nn.Parameter(tensor, requires_grad=value(node).requires_grad)
        for name in names:
            path, _, key = name.rpartition(".")
            module = _submodule(root, path)
            table: dict[str, Any] = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
            table[key] = tensor
    return root


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, made where there is none. Names are keys of tables and never attributes of the module."""
    from torch import nn

    for part in path.split(".") if path else ():
        found = root._modules.setdefault(part, nn.Module())
        assert found is not None
        root = found
    return root


def _tensor(name: str, kind: Value, given: Mapping[str, Tensor], generator: torch.Generator, below: int) -> Tensor:
    """The given tensor, or a random one; whole numbers are below ``below``."""
    import torch

    found = given.get(name)
    if found is not None:
        if (found.dtype, tuple(found.shape)) != (kind.dtype, kind.shape):
            raise ProgramFileError(
                f"'{name}' is {found.dtype} {list(found.shape)}; the program takes {kind.dtype} {list(kind.shape)}"
            )
        return found
    if given:
        raise ProgramFileError(f"no tensor was given for '{name}'; there are {', '.join(given)}")
    if kind.dtype.is_floating_point:
        return torch.randn(kind.shape, generator=generator).mul_(DEVIATION).to(kind.dtype)
    return torch.randint(below, kind.shape, generator=generator).to(kind.dtype)


def refuse_too_large(program: AnyProgram, *, random: bool) -> None:
    """Raise ValueError where the ranks on this machine would not have the memory for the program's whole tensors.

    ``random``: with weights that they draw.
    """
    from autopar.ir.node import value
    from autopar.ir.tables import InputKind
    from autopar.ir.traffic import size_text
    from autopar.zoo.named import LARGE

    kinds = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.INPUT)
    tensors = [value(node) for node, _ in program.placeholders(*kinds)]
    each = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", program.mesh.world_size))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if ranks * (each + PROCESS) > memory or random and each > LARGE:
        given = "" if not random else "random weights, "
        raise ValueError(
            f"the program is too large to be run here: {given}{ranks} ranks on this machine, each with "
            f"{size_text(each)} of whole tensors; the machine has {size_text(memory)}\n"
            "Way out: start it under torchrun on more machines, with --weights; "
            "or compile a smaller model, --config layers=2."
        )


def _least_rows(program: AnyProgram) -> int:
    """The number of rows of the smallest table: whole numbers below it are valid indices into any table."""
    from autopar.ir.node import value
    from autopar.ir.tables import InputKind

    shapes = [value(node).shape for node, _ in program.placeholders(InputKind.PARAMETER)]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=2)


def _whole(tensor: Tensor) -> Tensor:
    full: Any = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu()


def _read(path: Path | None) -> dict[str, Tensor]:
    import safetensors.torch

    if path is None:
        return {}
    try:
        os.close(open_plain(path))  # a pipe in its place would be waited for
        found: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return found
