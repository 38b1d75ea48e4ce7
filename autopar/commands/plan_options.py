"""The options of a plan, made from the fields of ``Plan`` and its docstring, beside ``--plan`` FILE or KEY=VALUE.

Every command that takes a plan has ``--zero 3 --precision bf16 --schedule zb-v ...``: it takes a ``PlanChoices``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from docstring_parser import DocstringStyle, parse
from rich.markup import escape

from autopar.commands.bundles import option
from autopar.commands.literals import key_and_value, literal
from autopar.plan import FORMS, RECOMPUTE_FORMS, Plan, read_choices
from autopar.schedules.named import NAMES

PANEL = "The plan (autopar.Plan)"
NARROW = 18  # columns of the values in --help; longer lists are in the text
# --seed is that of the weights and the batch, --verify of export runs what was written
RENAMED = {"seed": "dropout-seed", "verify": "prove"}
WORDS: Mapping[str, tuple[object, ...]] = {**FORMS, "recompute": RECOMPUTE_FORMS, "schedule": tuple(NAMES)}
FORM = {  # of a value, by the type of the field
    "int": "N",
    "int | None": "N",
    "float": "NUMBER",
    "float | None": "NUMBER",
    "Precision": "DTYPE",
    "tuple[str, ...]": "NAME,NAME",
    "Mapping[str, str]": "NAME=FORM",
    "Mapping[str, int | None]": "INPUT=DIM",
    "Mapping[str, tuple[int, ...]]": "NAME=2,0,1",
}


@dataclass(frozen=True)
class PlanChoices:
    """What a user has chosen of a plan, by the names of its fields; the rest has its defaults."""

    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        about = typer.Option(
            "--plan",
            metavar="FILE|KEY=VALUE",
            rich_help_panel=PANEL,
            help="a file with choices (plan.toml), or one choice; the options below go before both",
        )
        helps = _helps()
        return [option("plan_texts", Annotated[list[str] | None, about])] + [
            _option(entry, helps[entry.name]) for entry in fields(Plan)
        ]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Raises ValueError for a file that cannot be read, and for a choice or a value that a plan does not have."""
        read = read_plan_texts(given["plan_texts"])
        for entry in fields(Plan):
            found = given[_parameter(entry.name)]
            if found is not None:
                value = _read(entry, found)
                table = isinstance(value, Mapping) and isinstance(read.get(entry.name), Mapping)
                before = read.get(entry.name, {}) if table else {}
                rest = {key: choice for key, choice in before.items() if key not in value} if table else {}
                read[entry.name] = {**value, **rest} if table else value
        choices = cls(read)
        choices.plan()  # a mistake is told before any work
        return choices

    def plan(self, usual: Plan | None = None) -> Plan:
        """``usual`` with what was chosen. Raises ValueError."""
        try:
            return Plan.from_json({**(usual.to_json() if usual is not None else {}), **self.given})
        except TypeError as error:
            raise ValueError(f"the plan has a value of the wrong type: {error}") from error

    def over(self, usual: Mapping[str, Any]) -> PlanChoices:
        """These choices, and of ``usual`` those that were not made."""
        return PlanChoices({**usual, **self.given})


def read_plan_texts(texts: Iterable[str] | None) -> dict[str, Any]:
    """The choices of ``["plan.toml", "sequence=megatron", "tensor.*.o.weight=row"]`` by field; later ones win.

    Choices that are tables have the form KEY.ENTRY=VALUE. Raises ValueError for a file that cannot be read and for a
    text of another form; the names and values are not checked yet.
    """
    choices: dict[str, Any] = {}
    by_name = {entry.name: entry for entry in fields(Plan)}
    for text in texts or ():
        if "=" not in text:
            choices |= read_choices(text)
            continue
        key, found = key_and_value("--plan", text)
        name, dot, entry = key.partition(".")
        kind = str(by_name[name].type) if name in by_name else ""
        if name in by_name and kind.startswith("Mapping") and not dot or dot and not _has_entries(kind):
            form = f"{name}.ENTRY=VALUE" if not dot else f"{name}=VALUE"
            raise ValueError(f"--plan {text}: this choice is written {form}\nWay out: autopar show --help lists them.")
        if dot:
            before = choices.get(name, {})
            before = {"param": before} if isinstance(before, str) else before
            choices[name] = {**before, entry: _entry(kind, found)}
        else:
            choices[name] = _read(by_name[name], found) if name in by_name else literal(found)
    return choices


def _has_entries(kind: str) -> bool:
    return kind.startswith("Mapping") or kind == "Precision"


# ---------------------------------------------------------------- options


def _option(entry: Field[Any], help_text: str) -> inspect.Parameter:
    kind, name = str(entry.type), RENAMED.get(entry.name, entry.name.replace("_", "-"))
    words = "|".join(map(str, WORDS.get(entry.name, ())))
    narrow = len(words) <= NARROW
    if not all(word in help_text for word in words.split("|")):
        help_text = f"{words.replace('|', ', ')}: {help_text}"
    shown: dict[str, Any] = {"help": help_text, "rich_help_panel": PANEL, "show_default": False}
    if kind == "bool":
        both = typer.Option(f"--{name}/--no-{name}", **shown)
        return option(_parameter(entry.name), Annotated[bool | None, both])
    shown |= {"metavar": words * narrow or FORM.get(kind, "VALUE"), "autocompletion": _completion(entry.name)}
    several = kind.startswith(("Mapping", "tuple"))
    given: Any = list[str] if several else str
    return option(_parameter(entry.name), Annotated[given | None, typer.Option(f"--{name}", **shown)])


def _parameter(name: str) -> str:
    return f"plan_{name}"


def _completion(name: str) -> Any:
    def words(incomplete: str) -> list[str]:
        return [str(word) for word in WORDS.get(name, ()) if str(word).startswith(incomplete)]

    return words


def _helps() -> dict[str, str]:
    """Of each field its first sentence in the docstring."""
    described = parse(inspect.getdoc(Plan) or "", DocstringStyle.GOOGLE).params
    texts = {entry.arg_name: " ".join((entry.description or "").split()) for entry in described}
    return {name: escape(_first_sentence(text).replace("``", "").replace('"', "'")) for name, text in texts.items()}


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?=\s+[A-Z]|$)", re.sub(r"\s\([^()]*\)", "", text), maxsplit=1)[0]


# ---------------------------------------------------------------- values


def _read(entry: Field[Any], found: Any) -> Any:
    """The value of a field, of the text or texts that were given for it."""
    kind, name = str(entry.type), entry.name
    if isinstance(found, bool):
        return found
    if kind.startswith("tuple"):
        texts = found if isinstance(found, list) else [found]
        return tuple(part for text in texts for part in text.split(",") if part)
    if isinstance(found, list):
        return dict(_entries(entry, found))
    if kind == "Precision":
        return _precision(found)
    if name == "schedule" and ":" not in found and found not in NAMES and Path(found).is_file():
        return Path(found).read_text(encoding="utf-8")
    return found if found in WORDS.get(name, ()) else literal(found)


def _entries(entry: Field[Any], texts: list[str]) -> Iterator[tuple[str, Any]]:
    for text in texts:
        if entry.name == "expert_placement" and "=" not in text:
            yield from _placement_of(Path(text)).items()
        else:
            key, value = key_and_value(f"--{entry.name.replace('_', '-')}", text)
            yield key, _entry(str(entry.type), value)


def _entry(kind: str, text: str) -> Any:
    if "tuple" in kind:
        return tuple(literal(part) for part in text.split(","))
    return literal(text)


def _precision(text: str) -> Any:
    """``bf16``, or ``param=bf16,reduce=float32``."""
    if "=" not in text:
        return {"param": literal(text)}
    return {key: literal(value) for key, value in (key_and_value("--precision", part) for part in text.split(","))}


def _placement_of(log: Path) -> Mapping[str, tuple[int, ...]]:
    """Experts placed by the loads that a log of ``autopar train`` has."""
    from autopar.commands.expert_loads import read_loads  # which imports torch
    from autopar.routing.placement import balanced_placement

    return balanced_placement(read_loads(log))


def read_plan(texts: Iterable[str] | None) -> Plan:
    """The plan of ``["plan.toml", "sequence=megatron"]``. Raises ValueError."""
    return PlanChoices(read_plan_texts(texts)).plan()
