"""The tree of modules with their parameters; modules that are alike but for their number are one entry."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from autopar.ir.node import value
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.ir.tables import InputKind
from autopar.mesh import PIPELINE, SEQUENCE
from autopar.pipeline.stages import holders
from autopar.report.document import Drawing, Module, Parameter, Where
from autopar.report.parts import drawing
from autopar.report.reasons import why

DATA = ("dp", "dp_shard")


@dataclass
class _Draft:
    """A module while the tree is made."""

    parameters: list[Parameter] = field(default_factory=list)
    children: dict[str, _Draft] = field(default_factory=dict)


class Tree:
    """``root``: the model itself; ``drawings``: those that its parameters refer to."""

    def __init__(self, program: AnyProgram) -> None:
        self._program = program
        self._numbers: dict[Drawing, int] = {}
        places = tuple(range(program.mesh.size(PIPELINE)))
        unscheduled = isinstance(program, PipelinedProgram) and program.schedule is None
        owners = {} if unscheduled else holders(program)
        draft = _Draft()
        for node, entry in program.placeholders(InputKind.PARAMETER, InputKind.BUFFER):
            *path, name = entry.target.split(".")
            at = draft
            for part in path:
                at = at.children.setdefault(part, _Draft())
            number = self._numbers.setdefault(drawing(value(node), program.mesh), len(self._numbers))
            here = tuple(sorted(owners.get(entry.target, places)))
            is_buffer = entry.kind is InputKind.BUFFER
            at.parameters.append(Parameter(name, entry.target, entry.aliases, number, here, (), is_buffer))
        self.drawings = tuple(self._numbers)
        self.root = self._explained(self._module(draft, "", ""))

    def _module(self, draft: _Draft, name: str, path: str) -> Module:
        made = [self._module(child, own, f"{path}.{own}" if path else own) for own, child in draft.children.items()]
        sizes = [self.drawings[one.drawing] for one in draft.parameters]
        children = tuple(_merged(made))
        return Module(
            name, path, 1,
            bytes=sum(one.bytes for one in sizes) + sum(child.bytes for child in children),
            where=(), parameters=tuple(draft.parameters), children=children,
        )  # fmt: skip

    def _explained(self, module: Module) -> Module:
        """With the reasons of each parameter: only of those that are shown, since each costs a search."""
        return replace(
            module,
            parameters=tuple(
                replace(one, reasons=(*self._by_zero(one), *why(self._program, one.target)))
                for one in module.parameters
            ),
            children=tuple(map(self._explained, module.children)),
        )

    def _by_zero(self, one: Parameter) -> Iterator[str]:
        """Axes that nothing but ZeRO splits parameters over."""
        for axis in self.drawings[one.drawing].axes:
            if axis in (*DATA, SEQUENCE) and self._program.plan.zero:
                yield f"  {axis:<7} split by ZeRO, as Plan(zero={self._program.plan.zero}) asks"


def _merged(children: Sequence[Module]) -> Iterator[Module]:
    """Neighbours that are numbered one after the other, and alike, as one."""
    for _, run in itertools.groupby(enumerate(children), lambda item: _likeness(*item)):
        yield _as_one([module for _, module in run])


def _likeness(position: int, module: Module) -> Hashable:
    if not module.name.isdigit():
        return (module.name,)
    return int(module.name) - position, _shape(module)


def _shape(module: Module) -> Hashable:
    """What two modules have alike: all but their numbers and their pipeline ranks."""
    own = tuple((one.name, one.drawing, len(one.aliases), one.buffer) for one in module.parameters)
    return module.times, own, tuple((child.name, _shape(child)) for child in module.children)


def _as_one(run: Sequence[Module]) -> Module:
    first = run[0]
    if len(run) == 1:
        return first
    where: list[Where] = []
    for module in run:
        number, places = int(module.name), tuple(sorted(_places(module)))
        if where and where[-1].places == places:
            where[-1] = replace(where[-1], last=number)
        else:
            where.append(Where(number, number, places))
    everywhere = {place for entry in where for place in entry.places}
    merged = replace(
        _on(first, run), name=f"{first.name}..{run[-1].name}", times=len(run), where=tuple(where),
        bytes=sum(module.bytes for module in run),
    )  # fmt: skip
    assert _places(merged) == everywhere
    return merged


def _on(first: Module, run: Sequence[Module]) -> Module:
    """``first`` with its parameters on the places of all of ``run``."""
    parameters = tuple(
        replace(one, places=tuple(sorted({place for module in run for place in module.parameters[at].places})))
        for at, one in enumerate(first.parameters)
    )
    children = tuple(_on(child, [module.children[at] for module in run]) for at, child in enumerate(first.children))
    return replace(first, parameters=parameters, children=children)


def _places(module: Module) -> set[int]:
    own = {place for one in module.parameters for place in one.places}
    return own.union(*map(_places, module.children))
