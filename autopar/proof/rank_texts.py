"""The text of what one rank runs in a training step: written, and read back after somebody has edited it.

    # stage 1
    ...                                          the functions of a stage that the rank has, as emitted
    def forward(comm, inputs): ...
    def backward_whole(comm, inputs): ...

    # schedule
    # RECV F0.0 -> 1
    # F1.0

Without a pipeline it is :attr:`autopar.codegen.python.RankProgram.code`, the two functions alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from autopar.autodiff.halves import backward_steps
from autopar.codegen.python import RankProgram, emit
from autopar.errors import ProofError
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.mesh import PIPELINE
from autopar.proof.rank_lines import Code, read_code
from autopar.runtime.rank_graphs import BACKWARD, stage_graphs
from autopar.schedules.instructions import Compute, Instruction, Kind, Receive, Schedule, Send

STAGE, SCHEDULE = re.compile(r"# stage (\d+)"), "# schedule"
_STEP = re.compile(r"(?:(SEND|RECV) )?([FBIW])(\d+)\.(\d+)(?: -> (\d+))?")
WAY_OUT = "Way out: edit what autopar.proof.rank_texts.text_of(program, rank) gives."


@dataclass(frozen=True)
class RankText:
    """``codes``: the functions of each stage, 0 without a pipeline; ``steps``: what the schedule of the rank says."""

    codes: Mapping[int, Mapping[str, Code]]
    steps: tuple[Instruction, ...] | None = None


def text_of(program: AnyProgram, rank: int) -> str:
    """All that ``rank`` runs in a training step, with its numbers, as text; on a pipeline with its schedule."""
    if isinstance(program, Program):
        return RankProgram(program, rank).code
    here = RankProgram(program, rank)
    parts = [
        f"# stage {number}\n{emit(stage_functions(program, number), program.stages[number], stage.coordinates)}"
        for number, stage in here.stages.items()
    ]
    return "\n\n".join([*parts, f"{SCHEDULE}\n" + "".join(f"# {step}\n" for step in here.instructions.splitlines())])


def stage_functions(program: PipelinedProgram, number: int) -> Mapping[str, fx.Graph]:
    """What ranks run of a stage, by name."""
    stage = program.stages[number]
    return stage_graphs(stage, backward_steps(stage), program.loss_in(stage)).usual


def read_text(program: AnyProgram, text: str, rank: int) -> RankText:
    """The inverse of :func:`text_of`. Raises ProofError for text that is no program of this rank."""
    if isinstance(program, Program):
        return RankText({0: read_code(text)})
    stages, steps = dict[int, str](), None
    for name, first, lines in _sections(text):
        if name == SCHEDULE:
            steps = tuple(_step(line.removeprefix("# ")) for line in lines if line.strip())
        else:
            stages[int(STAGE.fullmatch(name).group(1))] = "\n" * first + "\n".join(lines)  # type: ignore[union-attr]
    wanted = RankProgram(program, rank).stages
    if stages.keys() != wanted.keys():
        words = ", ".join(map(str, stages)) or "no stage"
        raise ProofError(
            f"the code of rank {rank} is of {words}, the rank has {', '.join(map(str, wanted))}\n{WAY_OUT}"
        )
    codes = {number: read_code(code) for number, code in stages.items()}
    for number, functions in codes.items():
        if BACKWARD in functions:
            words = f"the code of rank {rank} has '{BACKWARD}' of stage {number}, which no schedule runs"
            raise ProofError(f"{words}\n{WAY_OUT}")
    return RankText(codes, steps)


def schedules_of(program: AnyProgram, texts: Mapping[int, RankText]) -> Iterator[Schedule]:
    """The schedules by which ranks run: the program's, and those of lines of ranks some of whose steps were changed."""
    if isinstance(program, Program) or program.schedule is None:
        return
    yield program.schedule
    mesh = program.mesh
    for line in sorted({tuple(mesh.group(rank, PIPELINE)) for rank in texts}):
        found = ((texts[rank].steps if rank in texts else None, mesh.coordinates(rank)[PIPELINE]) for rank in line)
        ranks = tuple(program.schedule.ranks[place] if steps is None else steps for steps, place in found)
        if ranks != program.schedule.ranks:
            yield replace(program.schedule, ranks=ranks)


def _sections(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """The name of each section, the number of its first line, and its lines."""
    name, first, lines = "", 0, list[str]()
    for number, line in enumerate(text.splitlines()):
        if line == SCHEDULE or STAGE.fullmatch(line):
            if name:
                yield name, first, lines
            name, first, lines = line, number + 1, []
        else:
            lines.append(line)
    if name:
        yield name, first, lines


def _step(line: str) -> Instruction:
    found = _STEP.fullmatch(line.strip())
    if found is None or (found.group(1) is None) != (found.group(5) is None):
        raise ProofError(f"'{line.strip()}' is no step of a schedule (F0.3, SEND F0.3 -> 1, RECV B1.3 -> 0)\n{WAY_OUT}")
    kind, stage, microbatch = Kind(found.group(2)), int(found.group(3)), int(found.group(4))
    if found.group(1) is None:
        return Compute(kind, stage, microbatch)
    other = int(found.group(5))
    if found.group(1) == "SEND":
        return Send(kind, stage, microbatch, other)
    return Receive(kind, other, microbatch, stage)
