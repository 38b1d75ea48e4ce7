"""``autopar coverage``: which architectures are exact and really split, in a table, with the reasons for the rest."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from autopar import __version__
from autopar.commands.bundles import expanded
from autopar.commands.known_names import FAMILIES
from autopar.commands.options import Json, ModelChoices, read_mesh
from autopar.commands.plan_options import PlanChoices
from autopar.commands.tables import print_json, stderr, stdout, table
from autopar.errors import near_names

if TYPE_CHECKING:  # which import torch
    from autopar.verification.coverage import Case, Coverage, Outcome

OWN_FAMILY = "plain torch"
USER = "of the user"
ROWS = 4  # of a batch, at least: the data ranks of each mesh divide them
WIDTH = 170  # of the table, where it is not printed on a terminal

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME|MODEL]...", help="architectures, or models of any form; default: all"),
]


@expanded
def coverage(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME|MODEL]...", help="architectures, or models of any form; default: all"),
    ] = None,
    family: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join((*FAMILIES, OWN_FAMILY))}; may be given several times")
    ] = None,
    mesh: Annotated[
        list[str] | None, typer.Option("--mesh", metavar="AXES", help="not the usual ones; may be given several times")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="architectures at a time")] = min(2, os.cpu_count() or 1),
    markdown: Annotated[Path | None, typer.Option(help="also write the table to this file")] = None,
    *,
    plan: PlanChoices,
    choices: ModelChoices,
    as_json: Json = False,
) -> None:
    """Build small models of many architectures, parallelise each, simulate it in float64, compare and measure.

    A mesh passes if the numbers are those of the unmodified model and the work is split: on dp everything that depends
    on the batch, with no collectives but those of loss and gradients; on tp nine tenths of the parameters; on sp every
    attention; on ep every layer of experts. Exit code 1 if any number differs or a model cannot be traced.
    """
    from autopar.verification.coverage import CASES

    chosen = _chosen(names or [], family or [], choices)
    cases = CASES if mesh is None and not plan.given else _cases(mesh or [case.title for case in CASES[:4]], plan)
    found = dict(_covered(chosen, cases, jobs, choices))
    rows = [found[name] for name in chosen]
    if as_json:
        print_json(_document(rows))
    else:
        _print(rows, [case.title for case in cases])
    if markdown is not None:
        markdown.write_text(_markdown(rows, [case.title for case in cases]), encoding="utf-8")
    if any(row.failure or not all(outcome.exact or outcome.failure for outcome in row.outcomes) for row in rows):
        raise typer.Exit(1)


def _chosen(names: Sequence[str], families: Sequence[str], choices: ModelChoices) -> dict[str, str]:
    """Name -> family of the architectures and models that were named. Raises ValueError for an unknown name."""
    from autopar import zoo
    from autopar.zoo.named import OURS

    known = {name: entry.family for name, entry in zoo.ARCHITECTURES.items()}
    known |= {f"models.{name}": OWN_FAMILY for name in OURS}
    names = [_known_as(name) for name in names]
    known |= {name: USER for name in names if name not in known and _is_model(name, choices)}
    for given, there in ((names, known), (families, (*FAMILIES, OWN_FAMILY))):
        for name in given:
            if name not in there:
                near = near_names(name, there)
                raise ValueError(f"coverage knows no '{name}'{near}\nWay out: one of {', '.join(there)}.")
    wanted = names or known
    return {name: known[name] for name in wanted if not families or known[name] in families}


def _known_as(name: str) -> str:
    """The name in the table: of ``tiny:llama`` that of the architecture, of ``mlp`` that of the model of ours."""
    from autopar import zoo
    from autopar.zoo.named import OURS

    ours = name in OURS and name not in zoo.ARCHITECTURES
    return f"models.{name}" if ours else name.removeprefix("tiny:").removeprefix("hf:")


def _is_model(name: str, choices: ModelChoices) -> bool:
    """Whether ``name`` is of a model that is no architecture of ours. Raises ValueError where it cannot be made."""
    from autopar.zoo.hub_configs import is_folder

    if not (set(name) & set(":/.") or is_folder(name)):
        return False
    if not choices.example(name).has_weights:
        raise ValueError(f"{name} is too large to be run here\nWay out: a smaller one, e.g. --config layers=2")
    return True


def _cases(meshes: Sequence[str], plan: PlanChoices) -> tuple[Case, ...]:
    from autopar.verification.coverage import Case

    return tuple(Case(text, read_mesh(text), plan.plan()) for text in meshes)


# ---------------------------------------------------------------- measuring


def _covered(
    chosen: dict[str, str], cases: Sequence[Case], jobs: int, choices: ModelChoices
) -> Iterator[tuple[str, Coverage]]:
    """The rows of several architectures at a time, each in one of ``jobs`` processes."""
    context = multiprocessing.get_context("spawn")
    with (
        Progress(console=stderr(), transient=True) as progress,
        ProcessPoolExecutor(jobs, context) as pool,
    ):
        task = progress.add_task("coverage", total=len(chosen))
        running = {pool.submit(measure, name, family, cases, choices): name for name, family in chosen.items()}
        for done in as_completed(running):
            progress.update(task, advance=1, description=running[done])
            yield running[done], done.result()


def measure(name: str, family: str, cases: Sequence[Case], choices: ModelChoices | None = None) -> Coverage:
    """One row of the table."""
    import torch

    from autopar.ir.batch import data_ways
    from autopar.verification.coverage import Coverage, cover
    from autopar.zoo.named import named_model

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    ways = math.lcm(*(data_ways(case.mesh) for case in cases))
    rows = ways * math.ceil(ROWS / ways)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if family == USER:
                asked = choices or ModelChoices()
                example = replace(asked, batch=asked.batch or rows).example(name)
            else:
                example = named_model(name if family == OWN_FAMILY else f"hf:{name}", batch=rows)
            return cover(name, family, example.model, example.batch, cases)
        except Exception as error:  # one architecture must not end the others
            text = " ".join(str(error).split())[:200]
            return Coverage(name, family, failure=f"fault: {type(error).__name__}: {text}")


# ---------------------------------------------------------------- showing


def _print(rows: Sequence[Coverage], titles: Sequence[str]) -> None:
    notes: list[str] = []
    cells = [_cells(row, titles, notes) for row in rows]
    console = stdout(WIDTH)
    console.print(table(_title(rows), _columns(titles), cells))
    for note in notes:
        console.print(note, markup=False, highlight=False)
    console.print(_summary(rows, titles))


def _title(rows: Sequence[Coverage]) -> str:
    from autopar.check import TOLERANCE

    return f"{len(rows)} architectures, float64, against the unmodified model (tolerance {TOLERANCE:g})"


def _columns(titles: Sequence[str]) -> list[str]:
    return ["architecture", "size", *titles, "error", "parameters", "compute", "collectives", "seconds"]


def _cells(row: Coverage, titles: Sequence[str], notes: list[str]) -> list[str]:
    count = f"{row.parameters / 1e6:.2f} M"
    if row.failure:
        return [row.name, count, *[_noted("not traced", [row.failure], row.name, notes)] * len(titles), *[""] * 5]
    if row.unknown:
        notes.append(f"({len(notes) + 1}) {row.name}: operators without a rule: {', '.join(row.unknown)}")
    by_title = {outcome.title: outcome for outcome in row.outcomes}
    verdicts = [_verdict(row, by_title[title], notes) for title in titles]
    errors = [outcome.error for outcome in row.outcomes if outcome.error is not None]
    widest = max(row.outcomes, key=lambda outcome: (len(outcome.compute), outcome.exact))
    return [
        row.name,
        count,
        *verdicts,
        f"{max(errors):.0e}" if errors else "",
        "  ".join(_percent(share) for share in widest.parameters.values()),
        ", ".join(_percent(share) for share in widest.compute.values()),
        _collectives(widest),
        f"{sum(outcome.seconds for outcome in row.outcomes):.0f}",
    ]


def _verdict(row: Coverage, outcome: Outcome, notes: list[str]) -> str:
    """``pass``, or what the model does not have; otherwise the verdict and the number of a note."""
    reasons = [*([outcome.failure] if outcome.failure else []), *outcome.remarks]
    if outcome.passed:
        return "pass"
    if outcome.absent:
        return f"no {outcome.absent}"
    if outcome.error is None:
        return _noted("refused", reasons, row.name, notes)
    if not outcome.exact:
        return _noted("WRONG", [f"error {outcome.error:.1e}", *reasons], row.name, notes)
    return _noted("in part" if outcome.failure else "exact", reasons, row.name, notes)


def _noted(verdict: str, reasons: Sequence[str], name: str, notes: list[str]) -> str:
    text = f"{name}: {'; '.join(reasons)}"
    known = [note.split(") ", 1)[1] for note in notes]
    if text not in known:
        notes.append(f"({len(notes) + 1}) {text}")
        known.append(text)
    return f"{verdict} ({known.index(text) + 1})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share > 0.9995 else f"{100 * share:.1f} %"


def _collectives(outcome: Outcome) -> str:
    """``dp 3 AR  tp 13 AR 2 AG``, forward and backward."""
    from autopar.ir.collectives import row_of

    counts: dict[str, dict[str, int]] = {}
    for transfer in outcome.traffic:
        kinds = counts.setdefault(transfer.axis, {})
        short = row_of(transfer.name).short
        kinds[short] = kinds.get(short, 0) + transfer.operations
    return "  ".join(f"{axis} {' '.join(f'{n} {kind}' for kind, n in kinds.items())}" for axis, kinds in counts.items())


def _summary(rows: Sequence[Coverage], titles: Sequence[str]) -> str:
    outcomes = [outcome for row in rows for outcome in row.outcomes]
    parts = []
    for title in titles:
        here = [outcome for outcome in outcomes if outcome.title == title]
        counts = [f"{sum(outcome.passed for outcome in here)} pass", f"{sum(outcome.exact for outcome in here)} exact"]
        absent = Counter(f"without {outcome.absent}" for outcome in here if outcome.absent)
        parts.append(f"{title}: {', '.join([*counts, *(f'{count} {what}' for what, count in absent.items())])}")
    traced = sum(not row.failure for row in rows)
    return f"{traced} of {len(rows)} traced; {'; '.join(parts)}"


def _markdown(rows: Sequence[Coverage], titles: Sequence[str]) -> str:
    import torch

    notes: list[str] = []
    lines = [_row(_columns(titles)), _row(["---"] * len(_columns(titles)))]
    lines += [_row(_cells(row, titles, notes)) for row in rows]
    made = f"Made by `autopar coverage --markdown` with autopar {__version__}, torch {torch.__version__}."
    text = [f"# Coverage: {_title(rows)}", made, EXPLANATION, "\n".join(lines), _summary(rows, titles)]
    text += ["\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(text) + "\n"


EXPLANATION = """\
- **pass**: loss, outputs and every gradient are those of the unmodified model in float64, and the work is split: on dp
  everything that depends on the batch, with no floating collectives but reductions of loss and gradients; on tp at
  least 90 % of the bytes of the parameters, which stay split while computing; on sp every attention, and all else that
  depends on an input; on ep, a data axis too, every layer of experts is dealt out, and rows are sent to them and back.
- **exact**: the numbers are right, but something was gathered or is done whole: the note says what and where.
- **in part**: by default an error (the note); with `Plan(on_indivisible="replicate")` exact, some parts whole.
- **no sequence**, **no experts**: there is nothing of what the axis splits, and the user gets an error that says so.
- **refused**: an error for the user too, with that reason. **WRONG**: the numbers differ.
- On the mesh with most axes: the share of the bytes of the **parameters** that tp splits; the shares of the
  **compute** that dp and tp split (in operations, on dp of what depends on the batch); **collectives** in a step,
  forward and backward: AR all-reduce, AG all-gather, RS reduce-scatter, A2A all-to-all. **error** is the largest."""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _document(rows: Sequence[Coverage]) -> dict[str, Any]:
    import torch

    from autopar.check import TOLERANCE

    documents = []
    for row in rows:
        document = asdict(row)
        for outcome, entry in zip(row.outcomes, document["outcomes"]):
            entry |= {"exact": outcome.exact, "passed": outcome.passed}
        documents.append(document)
    return {"tolerance": TOLERANCE, "torch": torch.__version__, "architectures": documents}
