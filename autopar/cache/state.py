"""What a program assumes of the process that uses it, as lines of a table: equal tables, equal programs.

A trace says what it asked for (:class:`autopar.observation.trace_record.TraceRecord`). The same questions are asked of
a model in any process, and the answers are digests. Of the code that ran, all has to be in the table: it is reached
from the model by the names that code uses, or from the module that defines it; where some is not, the program is not
kept.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.cache.code_digests import code_digest, digest, quick_text_digest, text_digest, variables_named
from autopar.cache.impure import refuse_impure
from autopar.cache.names import Name, names_in
from autopar.cache.reasons import Unstorable
from autopar.cache.transcript import Transcript
from autopar.cache.value_digests import Digests
from autopar.ir.asked_of_inputs import ATTRIBUTE, STRIDES, told
from autopar.ir.guards import Guards
from autopar.ir.same_values import PLAIN
from autopar.observation.code_names import Names, is_users, names_found_by, names_of
from autopar.observation.gradient_mode import questions_of_modes
from autopar.observation.named_state import STATE
from autopar.observation.readings import Readings
from autopar.observation.tables import is_of_hooks
from autopar.observation.torch_switches import SWITCHES, switches
from autopar.observation.trace_record import Effect, TraceRecord
from autopar.observation.what_ran import follow_what_ran, is_users_code, places_of

State = Mapping[str, str]  # what something is called -> a digest of it


@dataclass(frozen=True)
class Questions:
    """What to ask of a model, all of plain values.

    Attributes:
        asked: of each trace, (address of an owner, attribute) in order.
        effects: of each trace, what forward leaves.
        ran_at: of each trace, the places of the functions that ran.
        ran: digests of the functions that ran.
        places: (module, name in it) from which more of them are reached.
        names: that they use, which lead to modules, or into those of others.
        outputs: classes in the structure of the outputs, by the names under which torch knows them.
        variables: names of environment variables.
        known: digests of code -> the names that it reads, which takes long to find.
        followed: the functions that ran, or may have been called, by module and name.
        modes: what forward asks about the mode of its caller.
        of_inputs: what it asks of inputs beside what a key has of them.
    """

    asked: tuple[tuple[tuple[str, str], ...], ...]
    effects: tuple[tuple[Effect, ...], ...]
    ran_at: tuple[frozenset[str], ...]
    ran: frozenset[str]
    places: tuple[tuple[str, str], ...] = ()
    names: tuple[Name, ...] = ()
    outputs: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    known: Mapping[str, Names] = field(default_factory=dict)
    followed: frozenset[str] = frozenset()
    modes: tuple[str, ...] = ()
    of_inputs: tuple[str, ...] = ()


@dataclass
class Answers:
    """``state``: the table, or ``quick``: a digest for all of it. ``guards``: the same for this process, from now on.

    ``readings``, ``digests``: made it.
    """

    state: dict[str, str] = field(default_factory=dict)
    quick: str = ""
    guards: Guards = field(default_factory=Guards)
    readings: list[Readings] = field(default_factory=list)
    digests: list[Digests] = field(default_factory=list)


def questions_of(
    records: Sequence[TraceRecord], guards: Guards | None, model: nn.Module, outputs: pytree.TreeSpec | None = None
) -> Questions:
    """What ``records`` lead to; ``guards``: what they found; ``outputs``: the structure of what the model returns.

    Raises Unstorable where the answers would not tell all that the traces depend on."""
    obstacle = next((record.obstacle for record in records if record.obstacle), "")
    if obstacle or not records:
        raise Unstorable(obstacle or "nothing was traced")
    of_inputs = {name for record in records for name in record.of_inputs}
    in_no_key = {name for name in of_inputs - {STRIDES} if not name.startswith(ATTRIBUTE)}
    if in_no_key:
        raise Unstorable(f"forward asks of its inputs {told(in_no_key)}, which no key has")
    code = {one for record in records for one in record.code if is_users_code(one)}
    found = Questions(
        tuple(tuple(record.asked) for record in records),
        tuple(tuple(record.effects) for record in records),
        tuple(places_of(record.code) for record in records),
        frozenset(map(code_digest, code)),
        outputs=tuple(_classes_in(outputs)),
        modes=tuple(sorted({mode for record in records for mode in record.modes})),
        of_inputs=tuple(sorted(of_inputs)),
    )
    answers = answered(found, model)
    if guards is not None:
        _check_same_readings(answers.guards, guards)
    found = replace(found, places=tuple(sorted(_places_of(_unreached(answers, code)))))
    answers = answered(found, model) if found.places else answers
    missing = _unreached(answers, code)
    if missing:
        where = min(f"{one.co_qualname} ({one.co_filename}:{one.co_firstlineno})" for one in missing)
        raise Unstorable(f"{where} ran, and is reached from nothing that has a name")
    names = names_in(_functions_that_ran(answers, found.ran), code)
    refuse_impure(names)
    variables = {name for record in records for name in record.variables}
    variables |= {name for digests in answers.digests for one in digests.code for name in variables_named(one)}
    strange = tuple(replace(name, user="") for name in names if _leads_elsewhere(name))
    met = [(one, readings) for readings, each in zip(answers.readings, answers.digests) for one in each.functions]
    followed = [one for one, readings in met if readings.has_followed(one) or code_digest(one.__code__) in found.ran]
    return replace(
        found,
        names=strange,
        variables=tuple(sorted(variables)),
        known={code_digest(one.__code__): names_of(one.__code__) for one in followed},
        followed=frozenset(f"{one.__module__}.{one.__qualname__}" for one in followed),
    )


def answered(questions: Questions, model: nn.Module) -> Answers:
    """The state of ``model`` and of this process. Raises Unstorable where what is asked for is missing or has none."""
    found = Answers()
    _ask(questions, model, found, lambda address: _Lines(Digests(address), found.state))
    return found


def quickly_answered(questions: Questions, model: nn.Module) -> Answers:
    """As :func:`answered`, without a table: ``quick`` is another one wherever the table would be.

    Raises any exception where there is no such digest.
    """
    found, transcripts = Answers(), list[Transcript]()

    def lines(address: Callable[[Any], str | None]) -> _Lines:
        transcripts.append(Transcript(address, questions.followed))
        return _QuickLines(transcripts[-1])

    with names_found_by(lambda code: questions.known.get(code_digest(code))):
        _ask(questions, model, found, lines)
    found.quick = digest(*(one.digest() for one in transcripts))
    return found


def _ask(
    questions: Questions, model: nn.Module, found: Answers, new: Callable[[Callable[[Any], str | None]], _Lines]
) -> None:
    several = []
    for number, (asked, effects, ran) in enumerate(zip(questions.asked, questions.effects, questions.ran_at)):
        readings = Readings(model)
        gone = readings.repeat(asked)
        if gone is not None:
            raise Unstorable(f"'{gone}' is missing")
        guards = readings.guards
        guards.effects = [placed(readings, effect) for effect in effects]
        lines = new(readings.address_of_watched())
        follow_what_ran(readings, ran)
        guards.settle()
        found.guards.extend(guards)
        found.readings.append(readings)
        found.digests.append(lines.digests)
        several.append(lines)
        _add(f"{number}", readings, lines, questions)
    found.guards.questions.extend(questions_of_modes(questions.modes))
    found.guards.inputs.extend(questions.of_inputs)
    lines = several[0] if several else new(lambda _: None)
    for name in questions.names:
        lines.put(f"name {'.'.join(name.chain)} in {name.module}", _of_name(lines.digests, name))
    for output in questions.outputs:
        lines.put(f"class {output}", _of_output(lines.digests, output))
    if SWITCHES in questions.modes:
        lines.put(SWITCHES, digest(*switches()))
    for mode in sorted(set(questions.modes) & set(STATE)):
        lines.put(mode, digest(repr(STATE[mode]())))
    for variable in questions.variables:
        value = digest(os.environ[variable]) if variable in os.environ else "missing"
        lines.put(f"environment variable {variable}", value)
    lines.settle()


def differences(before: State, now: State) -> list[str]:
    """The names of what differs."""
    return [name.partition(" ")[2] for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]


# ---------------------------------------------------------------- the table


def _add(number: str, readings: Readings, lines: _Lines, questions: Questions) -> None:
    """The lines of one trace: first what it read, then what the functions that ran may read beside that."""
    for module, name in questions.places:
        value = vars(sys.modules[module]).get(name) if module in sys.modules else None
        lines.put(f"{number} {name} of {module}", lines.digests.leniently(value))
    looked_at, done = 0, set[int]()
    while True:
        readings.spread()
        lines.add(number, readings.guards)
        lines.settle()
        new = [one for one in lines.digests.functions[looked_at:] if code_digest(one.__code__) in questions.ran]
        looked_at = len(lines.digests.functions)
        if not new:
            return
        for function in new:
            if id(function) in done:
                continue
            done.add(id(function))
            label = f"{number} the text of {function.__module__}.{function.__qualname__}"
            lines.put(label, lines.text_digest(function.__code__))
            readings.function(function)


class _Lines:
    """Puts what guards hold into a table, each thing once.

    Attributes:
        digests: what makes the lines.
    """

    def __init__(self, digests: Digests, state: dict[str, str]) -> None:
        self.digests, self._state = digests, state
        self._done = {"readings": 0, "absent": 0, "quiet": 0, "contents": 0}

    def add(self, number: str, guards: Guards) -> None:
        while any(len(getattr(guards, name)) > done for name, done in self._done.items()):
            for name in self._done:
                for one in getattr(guards, name)[self._done[name] :]:
                    self._done[name] += 1
                    label, found = _LINES[name](self.digests, one)
                    self.put(f"{number} {label}", found)

    def put(self, label: str, found: Any) -> None:
        """Two things may have one label; in which order they come is the same in every process."""
        name, count = label, 1
        while name in self._state:
            count += 1
            name = f"{label} ({count})"
        self._state[name] = found

    def settle(self) -> None:
        """All that was put is there, and so are the functions in it."""

    def text_digest(self, code: CodeType) -> str:
        """Of the lines of a function that ran."""
        return text_digest(code)


class _QuickLines(_Lines):
    """Lines that are written into a transcript."""

    def __init__(self, transcript: Transcript) -> None:
        super().__init__(transcript.parts, {})
        self._transcript = transcript
        self._labels: list[str] = []
        self._found: list[Any] = []

    def put(self, label: str, found: Any) -> None:
        self._labels.append(label)
        self._found.append(found)

    def settle(self) -> None:
        self._transcript.dump(("\0".join(self._labels), *self._found))
        self._labels, self._found = [], []

    def text_digest(self, code: CodeType) -> str:
        return quick_text_digest(code)


def _of_reading(digests: Digests, one: Any) -> tuple[str, Any]:
    try:
        if one.by_type and isinstance(one.value, Tensor):
            return one.label, digests.of_tensor(one.value, content=False)
        return one.label, digests.of(one.value)
    except Unstorable as reason:
        raise Unstorable(f"{one.label} is, or holds, {reason}") from None


def _of_contents(digests: Digests, one: Any) -> tuple[str, Any]:
    label = f"what {one.label} holds"
    try:
        held = one.container
        return label, digests.join(*digests.items(list(held.values()) if is_of_hooks(one) else held))
    except Unstorable as reason:
        raise Unstorable(f"{label}: {reason}") from None


_LINES: Mapping[str, Any] = {
    "readings": _of_reading,
    "absent": lambda _, one: (one[2], "missing"),
    "quiet": lambda _, one: (one[1], "none"),
    "contents": _of_contents,
}


def placed(readings: Readings, effect: Effect) -> tuple[dict[str, Any], str, Any]:
    """(table, key, value) of ``effect`` in this process. Raises Unstorable where its owner is missing."""
    owner = readings.owner_at(effect.owner)
    if owner is None:
        raise Unstorable(f"'{effect.owner}' is missing")
    own = object.__getattribute__(owner, "__dict__")
    return (own[effect.table] if effect.table else own), effect.key, effect.value


def _of_name(digests: Digests, name: Name) -> Any:
    value, _ = name.value()
    if isinstance(value, ModuleType) and is_users(value.__name__):  # its attributes may be taken by any name
        table = {key: item for key, item in vars(value).items() if isinstance(item, (*PLAIN, FunctionType, type))}
        return digests.join(*(part for key in sorted(table) for part in (key, digests.leniently(table[key]))))
    return digests.leniently(value)


def _of_output(digests: Digests, name: str) -> Any:
    cls = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    if cls is None or cls not in pytree.SUPPORTED_NODES:
        return "not known"
    return digests.join(*map(digests.leniently, pytree.SUPPORTED_NODES[cls][:3]))


# ---------------------------------------------------------------- whether it tells all


def _check_same_readings(repeated: Guards, traced: Guards) -> None:
    """Raise Unstorable unless asking again finds what the trace has found."""
    for of in (_read_by, _absent_from):
        again, first = of(repeated), of(traced)
        if again != first:
            raise Unstorable(f"{min(again ^ first)} was read, and would not be in another process, or the other way")


def _read_by(guards: Guards) -> set[str]:
    return {one.label for one in guards.readings}


def _absent_from(guards: Guards) -> set[str]:
    return {label for *_, label in guards.absent}


def _leads_elsewhere(name: Name) -> bool:
    """Whether readings do not follow ``name``: into torch, Python's library, or to a whole module."""
    value, where = name.value()
    return bool(where and not is_users(where)) or isinstance(value, ModuleType) or name.chain[0] in vars(builtins)


def _classes_in(structure: Any) -> list[str]:
    if structure is None or structure.is_leaf():
        return []
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(structure.type)
    inner: list[str] = [name for child in structure.children() for name in _classes_in(child)]
    own = known.serialized_type_name if known is not None else ""
    return sorted({*inner, *([own] if is_users(structure.type.__module__) else [])})


def _unreached(answers: Answers, code: set[CodeType]) -> set[CodeType]:
    return code - {one for digests in answers.digests for one in digests.code}


def _places_of(code: set[CodeType]) -> Iterator[tuple[str, str]]:
    """(module, name in it) of the functions or classes in which ``code`` is written."""
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    for one in code:
        name = modules.get(one.co_filename)
        first = one.co_qualname.partition(".")[0]
        if name is not None and first in vars(sys.modules[name]):
            yield name, first


def _functions_that_ran(answers: Answers, ran: frozenset[str]) -> list[FunctionType]:
    functions = [one for digests in answers.digests for one in digests.functions]
    return [one for one in functions if code_digest(one.__code__) in ran]
