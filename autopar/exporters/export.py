"""``autopar.export``: a program in the formats of other tools, written whole or not at all.

A format is a name and a writer in :data:`FORMATS`; each writes into a directory of its name. ``manifest.json`` says
what each file is: its rank, its inputs and outputs, who sends them to whom.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from autopar.errors import ExportError, check_kind
from autopar.exporters.dynamic_sizes import DynamicSizes
from autopar.exporters.job import Job, Options, Writer
from autopar.exporters.whole_tensors import Source, WholeTensors
from autopar.families.family import Family
from autopar.families.forms import Sizes, Terms
from autopar.families.tables import generalised
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.program_files.exchange import put
from autopar.program_files.manifest import describe

MANIFEST, FORMAT, VERSION = "manifest.json", "autopar export", 1
WEIGHTS = ("safetensors", "reference", "none")
DIALECTS = ("autopar", "tensorrt")
DYNAMIC = ("pt2", "onnx")  # formats whose files take batches of several sizes
FORMATS = {  # name -> module and function of its writer, imported when it is asked for: some need more packages
    "pt2": "autopar.exporters.pt2:write",
    "onnx": "autopar.exporters.onnx_file:write",
    "chakra": "autopar.exporters.steps:chakra",
    "trace": "autopar.exporters.steps:trace",
}


def export(
    program: AnyProgram | Family,
    directory: str | Path,
    format: str | Sequence[str] = "pt2",
    *,
    rank: int | None = None,
    weights: str | None = None,
    weights_from: Source | Sequence[Source] | None = None,
    verify: bool = False,
    opset: int | None = None,
    ir: int | None = None,
    onnx_dialect: str = "autopar",
    training: bool = False,
) -> Path:
    """Write ``program`` to ``directory`` in one or several formats (``"pt2"``, ``"onnx,pt2"``, ...); docs/exports.md.

    Args:
        program: compiled (``autopar.compile_program``, ``parallelize(...).program``), or loaded; or a family
            (``autopar.compile_family``, ``parallelize(...).families``), whose files take batches of all its sizes.
        rank: write this rank's files only.
        weights: ``safetensors``: the rank's part of each tensor; ``reference``: where in ``weights_from``, files, that
            part is; ``none``: names, shapes and dtypes. By default the first where ``weights_from`` is given.
        weights_from: the model, whole tensors by name, a safetensors file, or a folder of such files; or several of
            these, of which the first that has a name is taken.
        verify: run what was written, all ranks as one model, against the unmodified model, or the program's source.
        opset, ir: versions of ONNX files.
        onnx_dialect: of collectives in ONNX files, ``autopar`` or ``tensorrt``.
        training: write a training step, forward and backward, instead of the inference graph (``pt2``).

    Returns ``directory``. Raises ExportError, with nothing written, for a program that a format cannot hold, weights
    that are missing, files of others in ``directory``; and where ``verify`` finds other numbers.
    """
    kinds = Program | PipelinedProgram | Family
    check_kind("program", program, kinds, "compile_program(...), compile_family(...), or Program.load(DIR)")
    names = _names(format)
    whole = Whole.of(program, names)
    program = whole.program
    _check_finished(program)
    chosen = weights or ("none" if weights_from is None else "safetensors")
    _check_choices(chosen, onnx_dialect, weights_from)
    ranks = tuple(range(program.mesh.world_size))
    if rank is not None:
        program.mesh.coordinates(rank)
        ranks = (rank,)
    tensors = None if weights_from is None else WholeTensors.of(weights_from, made=program.made_buffers)
    options = Options(opset, ir, onnx_dialect, verify, training)
    with replaced(Path(directory)) as draft, _progress() as progress:
        task = progress.add_task("", total=None)
        entries: dict[str, Any] = {}
        for name in names:
            (draft / name).mkdir()
            told = lambda words, name=name: progress.update(task, description=f"{name}: {words}")  # noqa: E731
            job = Job(program, draft / name, ranks, chosen, tensors, options, whole.sizes, whole.members, told)
            entries[name] = writer(name)(job)
        files = sorted(path.relative_to(draft).as_posix() for path in draft.rglob("*") if path.is_file())
        text = json.dumps({**whole.head(), "weights": chosen, "files": files, "formats": entries}, indent=1)
        (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Path(directory)


def writer(name: str) -> Writer:
    """The writer of a format. Raises ExportError where a package that it needs is not installed."""
    module, _, function = FORMATS[name].partition(":")
    try:
        found: Writer = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ExportError(
            f"format '{name}' needs a package that is not installed: {error}\nWay out: pip install autopar[export]"
        ) from error
    return found


@dataclass(frozen=True)
class Whole:
    """What is exported: a program or, with ``sizes`` and some of its members, the program of a family."""

    program: AnyProgram
    sizes: DynamicSizes | None = None
    members: tuple[AnyProgram, ...] = ()
    points: tuple[Sizes, ...] = ()

    @classmethod
    def of(cls, given: AnyProgram | Family, formats: Sequence[str]) -> Whole:
        """Raises ExportError for a format that has no dynamic sizes, and for a family that has too few of them."""
        if not isinstance(given, Family):
            return cls(given)
        fixed = [name for name in formats if name not in DYNAMIC]
        if fixed:
            raise ExportError(
                f"format '{fixed[0]}' is of a batch of one size, and this is a family of programs\n"
                "Way out: export(family.member({'b': ..., 's': ...}), ...)."
            )
        sizes = DynamicSizes(given)
        members = tuple(given.member(point) for point in given.points)
        return cls(given.with_longest_constants(), sizes, members, given.points)

    def head(self) -> dict[str, Any]:
        """The manifest's part that all formats share; of a family with expressions in the places of sizes."""
        try:
            found = [describe(program) for program in self.members or (self.program,)]
        except ValueError as error:
            raise ExportError(f"the program cannot be described: {error}") from error
        kept = ("torch", "mesh", "plan", "inputs", "outputs", "parameters", "buffers", "groups", "ranks")
        heads = [{"format": FORMAT, "version": VERSION, **{key: whole[key] for key in kept}} for whole in found]
        if self.sizes is None:
            return heads[0]
        return {**generalised(heads, Terms(self.points)), "sizes": self.sizes.to_json()}


def _names(format: str | Sequence[str]) -> list[str]:
    names = [name.strip() for name in (format.split(",") if isinstance(format, str) else format)]
    for name in names:
        if name not in FORMATS:
            raise ExportError(f"there is no format '{name}'\nWay out: one of {', '.join(FORMATS)}.")
    return list(dict.fromkeys(names))


def _check_choices(weights: str, dialect: str, weights_from: Any) -> None:
    for what, given, known in (("weights", weights, WEIGHTS), ("onnx_dialect", dialect, DIALECTS)):
        if given not in known:
            raise ExportError(f"{what}='{given}' is no choice\nWay out: one of {', '.join(known)}.")
    if weights != "none" and weights_from is None:
        raise ExportError(
            f"weights='{weights}', and a program holds no weights\n"
            "Way out: weights_from= the model, its state dict or its safetensors files; or weights='none'."
        )


def _check_finished(program: AnyProgram) -> None:
    if isinstance(program, Program):
        _ = program.required_role
    elif isinstance(program, PipelinedProgram):
        _ = program.required_schedule


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new directory beside ``target``, which takes its place at the end, and is gone when something fails.

    Raises ExportError where ``target`` is something else than an empty directory or an export, and where somebody has
    put files of their own into that.
    """
    target = target.absolute()
    _refuse_strangers(target)
    draft = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        yield draft
        put(draft, target)
    except OSError as error:
        raise ExportError(f"the export cannot be written to {target}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _refuse_strangers(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{target} is a file; give the name of a directory")
    present = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    ours = _written(target) if present else set()
    if present and not ours:
        raise ExportError(f"{target} is not empty and holds no export; give another directory")
    if strangers := sorted(present - ours):
        raise ExportError(
            f"{target} holds files that are not of the export there: {', '.join(strangers[:5])}\n"
            "Way out: move them away, or export into another directory."
        )


def _written(target: Path) -> set[str]:
    """The files that an export has written to ``target``; none where that is no export."""
    try:
        found = json.loads((target / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return set()
    known = isinstance(found, dict) and found.get("format") == FORMAT and isinstance(found.get("files"), list)
    return {MANIFEST, *map(str, found["files"])} if known else set()


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
