"""A family of programs on disk: the directory of its first program, and what makes the others of it.

sizes.json            the compiled sizes; the expressions; which numbers of the program are which of them, by their
                      positions among all (:func:`autopar.families.walk.numbers_of`); the dims of a call that are sizes
longest.safetensors   the longest of each constant that changes, by the numbers that sizes.json has for them

Without these two it is the program of the first sizes. Expressions are written as terms, not as text: nothing is
evaluated that a file says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import sympy

from autopar.errors import AutoparError, ProgramFileError
from autopar.families.constants import Beginning
from autopar.families.family import Family
from autopar.families.forms import form_of, terms_of
from autopar.families.sizes import Range, Scheme
from autopar.families.walk import constants_of, in_order, numbers_of
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.size_conditions import Condition, as_json, rounded_of_json, size_of_json
from autopar.ir.sizes import is_expression
from autopar.ir.tables import Decision
from autopar.program_files.directory import LONGEST, SIZES, read_manifest, verified
from autopar.program_files.program_file import DAMAGE, load, save
from autopar.program_files.source_files import without_sources

MOST = 1 << 48  # of a size or a factor in a file


# ---------------------------------------------------------------- writing


def save_family(family: Family, directory: str | Path, *, extra_files: Mapping[str, str] | None = None) -> Path:
    """Write ``family`` to ``directory``, all of it or nothing. :func:`load_family` reads it, no code is needed then.

    ``extra_files``: as of :func:`autopar.program_files.program_file.save`.
    Decisions are kept without the costs of their alternatives. Raises ProgramFileError as
    :func:`autopar.program_files.program_file.save` does.
    """
    longest = {id(known.longest): known.longest for known in family.constants.values()}  # stages share theirs
    numbers = {key: str(number) for number, key in enumerate(longest)}
    copies = {numbers[key]: tensor.detach().cpu().contiguous().clone() for key, tensor in longest.items()}

    def files(read: AnyProgram) -> Mapping[str, bytes]:
        described = json.dumps(_described(family, read, numbers)).encode()
        return {SIZES: described, LONGEST: bytes(safetensors.torch.save(copies))}

    return save(family.first_program, directory, extra_files=extra_files, more=files)


def _described(family: Family, read: AnyProgram, tensors: Mapping[int, str]) -> dict[str, Any]:
    """``read``: the first program as it comes back, without a source that has no text form."""
    template = _as_written(family.template)
    template = template if read.source is not None else without_sources(template)
    expressions, numbers = numbers_of(template)[0], numbers_of(read)[0]
    known = family.numbers(family.points[0])
    assert known is not None
    if numbers != [known[each] if is_expression(each) else each for each in expressions]:
        raise ProgramFileError("the family cannot be saved: its program has other numbers when it is read back")
    place = {form: number for number, form in enumerate(family.forms)}
    assert family.scheme is not None, "a family without the dims of a call"
    return {
        "points": [dict(point) for point in family.points],
        "forms": [terms_of(form) for form in family.forms],
        "numbers": [[n, place[form]] for n, form in enumerate(expressions) if is_expression(form)],
        "constants": {
            name: [tensors[id(known.longest)], *(place[size] if is_expression(size) else -1 for size in known.shape)]
            for name, known in family.constants.items()
        },
        "names": [[*at, name] for at, name in family.scheme.names.items()],
        "fixed": [[*at, size] for at, size in family.scheme.fixed.items()],
        "tied": {name: as_json(part) for name, part in family.scheme.tied.items()},
        "rounded": [as_json(part) for part in family.rounded.values()],
        "regions": [[condition.as_json() for condition in region] for region in family.regions],
        "decisions": {
            axis: {node: decision.chosen for node, decision in made.items()}
            for axis, made in family.template.decisions.items()
        },
    }


def _as_written(program: AnyProgram) -> AnyProgram:
    """``program`` with what a directory has of it: what counts tokens stands once, and has no source of its own."""
    counts = None if program.counts is None else replace(program.counts, source=None)
    if not isinstance(program, PipelinedProgram):
        return replace(program, counts=counts)
    stages = tuple(replace(stage, source=None, counts=None) for stage in program.stages)
    tail = None if program.tail is None else _as_written(program.tail)
    return replace(program, counts=counts, stages=stages, tail=tail)  # type: ignore[arg-type]


# ---------------------------------------------------------------- reading


def holds_family(directory: str | Path) -> bool:
    """Whether the program in ``directory`` is a family. Raises ProgramFileError where there is no program."""
    return SIZES in read_manifest(Path(directory)).get("files", {})


def load_family(directory: str | Path, *, operators: Collection[str] = ()) -> Family:
    """The family that :func:`save_family` wrote; ``operators`` as in :func:`autopar.program_files.program_file.load`.

    Nothing in ``directory`` is run or imported. Raises ProgramFileError as ``load`` does, and where the directory has
    the program of one batch only.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if SIZES not in manifest.get("files", {}):
        raise ProgramFileError(
            f"{directory} holds the program of batches of one size\n"
            "Way out: Program.load(...); or save_family(compile_family(model, mesh, plan, batches), ...)."
        )
    contents = {name: verified(directory, name, manifest) for name in (SIZES, LONGEST)}
    program = load(directory, operators=operators)
    try:
        return _family(program, json.loads(contents[SIZES]), safetensors.torch.load(contents[LONGEST]))
    except DAMAGE as error:
        reason = str(error) if isinstance(error, AutoparError) else f"{type(error).__name__}: {error}"
        raise ProgramFileError(f"the family in {directory} cannot be read: {reason:.1000}") from error


def member_for(family: Family, shapes: Sequence[Sequence[int]]) -> AnyProgram:
    """The program for a batch whose tensors have ``shapes``. Raises ProgramFileError for one outside of the family."""
    given = tuple(tuple(shape) for shape in shapes)
    known = family.scheme is not None and family.scheme.fits(given)
    sizes = family.scheme.sizes(given) if family.scheme is not None and known else None
    if sizes is None or sizes not in family:
        here = ", ".join(str(list(shape)) for shape in given)
        raise ProgramFileError(
            f"a batch of {here} is none of this family, which is for {family}\n"
            "Way out: pad it to one of these sizes; or compile the family for more batches (compile_family)."
        )
    return family.member(sizes, family.template.fingerprint.call if family.template.fingerprint is not None else None)


def _family(program: AnyProgram, about: Mapping[str, Any], longest: Mapping[str, Any]) -> Family:
    """Raises any of ``DAMAGE``."""
    points = [{str(name): _size(value) for name, value in point.items()} for point in about["points"]]
    names = tuple(points[0])
    if any(tuple(point) != names for point in points) or not all(name.isidentifier() for name in names):
        raise ProgramFileError("its points are not of the same sizes")
    rounded = dict(rounded_of_json(part, names) for part in about.get("rounded", []))
    forms: list[sympy.Expr] = [form_of(terms, (*names, *rounded)) for terms in about["forms"]]
    numbers = list(numbers_of(program)[0])
    for place, form in about["numbers"]:
        numbers[_within(place, len(numbers))] = forms[_within(form, len(forms))]
    decisions = {
        str(axis): {str(node): Decision(str(chosen)) for node, chosen in made.items()}
        for axis, made in about["decisions"].items()
    }
    template = replace(in_order(program, numbers), decisions=decisions)
    constants = {
        str(place): Beginning(
            longest[tensor],
            tuple(
                size if form == -1 else forms[_within(form, len(forms))]
                for form, size in zip(shape, longest[tensor].shape, strict=True)
            ),
        )
        for place, (tensor, *shape) in about["constants"].items()
    }
    tied = {str(name): size_of_json(part, names) for name, part in about.get("tied", {}).items() if name not in names}
    named = _by_place(about["names"], lambda name: _one_of(name, (*names, *tied)))
    scheme = Scheme(named, _by_place(about["fixed"], _size), rounded, tied)
    ranges = {name: Range.of([point[name] for point in points]) for name in names}
    regions = [[Condition.of_json(tree, names) for tree in region] for region in about.get("regions", [[]])]
    family = Family(template, ranges, points, forms, constants, scheme, regions)
    _check(family, program)
    return family


def _check(family: Family, program: AnyProgram) -> None:
    """Raise ProgramFileError unless ``program`` is the member at the first sizes, and all points have one."""
    for point in family.points:
        if point not in family:
            raise ProgramFileError(f"{point} is not in it")
    if not family.agrees(program, family.points[0]):
        raise ProgramFileError("its expressions do not give the program of its first sizes")
    made, held = constants_of(family.member(family.points[0])), constants_of(program)
    if any(made[place].shape != held[place].shape for place in family.constants):
        raise ProgramFileError("its constants have other sizes than those of the program")


def _by_place(rows: Sequence[Any], of: Callable[[Any], Any]) -> dict[tuple[int, int], Any]:
    return {(_size(tensor), _size(dim)): of(item) for tensor, dim, item in rows}


def _one_of(name: Any, names: Collection[str]) -> str:
    if name not in names:
        raise ProgramFileError(f"{str(name):.40} is no size of it")
    return str(name)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MOST:
        raise ProgramFileError(f"{str(value):.40} is no size")
    return value


def _within(place: Any, count: int) -> int:
    if type(place) is not int or not 0 <= place < count:
        raise ProgramFileError(f"{str(place):.40} is no position among {count}")
    return place
