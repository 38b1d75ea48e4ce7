"""What a program was compiled for: the model as it was, the call, and the code that compiled it.

It is kept with the program, so that a model can be compared with it long after, without tracing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

Facts = Mapping[str, str]  # name of a thing -> what is known of it, as text
NOTHING = "missing"
SEPARATOR = "; "  # of the settings of a module
ASKED = " (asked by forward)"
OF_INPUTS = ", of inputs "
UNKNOWN = ""  # what could not be found out, and is not compared


@dataclass(frozen=True)
class CallFacts:
    """One kind of call; calls with equal facts run the same program.

    Attributes:
        inputs: (path, what is known) of each argument, in the order in which the program takes them.
        mode: training or evaluation, the dtypes of autocast, and gradients where the model's layers ask for them.
    """

    inputs: tuple[tuple[str, str], ...]
    mode: str

    @property
    def asks_for_gradients(self) -> bool:
        return self.mode.endswith(ASKED)

    def asked(self, gradients: bool) -> CallFacts:
        """These, of a model whose forward asks whether gradients are enabled."""
        return self if self.asks_for_gradients else replace(self, mode=f"{self.mode}, gradients {gradients}{ASKED}")

    @property
    def asked_of_inputs(self) -> list[str]:
        """What forward asks of inputs, see :mod:`autopar.ir.asked_of_inputs`."""
        names, _, answers = self.mode.partition(OF_INPUTS)[2].partition(": ")
        return names.split(", ") if answers else []

    def of_inputs(self, asked: Sequence[str], answers: Sequence[Any]) -> CallFacts:
        """These, of a model whose forward asks that of its inputs."""
        return replace(self, mode=f"{self.mode}{OF_INPUTS}{', '.join(asked)}: {answers}") if asked else self

    def __str__(self) -> str:
        return f"{self.mode}, {', '.join(f'{path} {fact}' for path, fact in self.inputs)}"


@dataclass(frozen=True)
class Fingerprint:
    """Attributes:
    code: versions of torch and autopar, of autopar's own files, and of the files that define the model.
    modules: path -> class and settings of each module.
    tensors: name -> kind, dtype, shape and whether it is trained, of each parameter and buffer.
    call: the call that was compiled.
    """

    code: Facts
    modules: Facts
    tensors: Facts
    call: CallFacts

    def to_json(self) -> dict[str, Any]:
        return {key: dict(item) if isinstance(item, Mapping) else item for key, item in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_json`. Raises KeyError, TypeError and ValueError for anything else."""
        tables = {entry.name: _facts(data[entry.name]) for entry in fields(cls) if entry.name != "call"}
        inputs = tuple((str(path), str(fact)) for path, fact in data["call"]["inputs"])
        return cls(**tables, call=CallFacts(inputs, str(data["call"]["mode"])))


def differences(program: Facts, here: Facts) -> Iterator[tuple[str, str, str]]:
    """(name, what the program knows of it, what it is here) for each thing that differs; of settings those that do."""
    for name in dict.fromkeys((*program, *here)):
        before, now = program.get(name, NOTHING), here.get(name, NOTHING)
        if before != now and UNKNOWN not in (before, now):
            yield name, *_apart(before, now)


def _apart(one: str, other: str) -> tuple[str, str]:
    first, second = one.split(SEPARATOR), other.split(SEPARATOR)
    if len(first) != len(second):
        return one, other
    differing = [(a, b) for a, b in zip(first, second) if a != b]
    return SEPARATOR.join(a for a, _ in differing), SEPARATOR.join(b for _, b in differing)


def _facts(data: Any) -> dict[str, str]:
    if not isinstance(data, dict) or not all(isinstance(fact, str) for fact in data.values()):
        raise ValueError("a table of a fingerprint has texts by name")
    return data
