"""The programs of one kind of call that differ by what the model's forward reads of Python (an attribute, a global)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from torch import nn

from autopar.errors import TraceError
from autopar.ir.asked_of_inputs import Answers, answers_of, told, unusual_answers
from autopar.ir.guards import Guards
from autopar.ir.program import AnyProgram
from autopar.ir.value_guards import MOST_OUTCOMES

Variant = tuple[int, Guards, Answers]  # its number, what it assumes, and what its inputs answered


class Variants:
    """Which of them a call takes: the one whose guards hold now, the latest first."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[Variant]] = {}
        self._latest: tuple[Hashable, Sequence[Variant]] = None, ()  # what was asked last: keys are large
        self._made: dict[Hashable, int] = {}

    def next(self, kind: Hashable) -> int:
        """The number of a variant that is to be made."""
        return self._made.get(kind, 0)

    def number(self, kind: Hashable, leaves: Sequence[Any]) -> int | None:
        """That of the variant for a call of this kind with these arguments; None where no guards hold.

        Raises TraceError where too many variants differ by what Python saw in tensors.
        """
        known = self._of(kind)
        for place, (number, guards, answers) in enumerate(known):
            if guards.inputs and answers_of(guards.inputs, leaves) != answers:
                continue
            if guards.hold() and (not guards.values or all(values.hold(leaves) for values in guards.values)):
                if place:
                    self._known[kind] = [known[place], *known[:place], *known[place + 1 :]]
                    self._latest = None, ()
                if guards.effects:
                    guards.replay()
                return number
        by_values = [guards for _, guards, _ in known if guards.values]
        if len(by_values) >= MOST_OUTCOMES:
            raise TraceError(
                f"the model looks at values in tensors, and {len(by_values)} programs were made for what it saw there\n"
                f"  {self._seen_otherwise(by_values[0], leaves)}\n"
                "Way out: torch.where or a mask instead of 'if'; for a size, pad to a few lengths, or pass the number "
                "as an argument."
            )
        return None

    def _of(self, kind: Hashable) -> Sequence[Variant]:
        if kind is not self._latest[0]:
            self._latest = kind, self._known.get(kind, ())
        return self._latest[1]

    def add(self, kind: Hashable, number: int, guards: Guards, leaves: Sequence[Any]) -> None:
        """A variant was made, as the model is now, for a call with these arguments."""
        guards.settle()
        guards.inputs = list(dict.fromkeys(guards.inputs))
        answers = answers_of(guards.inputs, leaves)
        self._latest = None, ()
        self._known.setdefault(kind, []).insert(0, (number, guards, answers))
        self._made[kind] = number + 1
        guards.replay()

    def remove(self, kind: Hashable, number: int) -> None:
        """Forget a variant."""
        self._latest = None, ()
        self._known[kind] = [pair for pair in self._known.get(kind, ()) if pair[0] != number]

    def change(self, kind: Hashable, leaves: Sequence[Any]) -> str:
        """What has changed since the latest variant, in words; empty if nothing, or if there is none."""
        known = self._known.get(kind)
        if not known:
            return ""
        _, guards, answers = known[0]
        asked = "" if answers_of(guards.inputs, leaves) == answers else f"the inputs differ in {told(guards.inputs)}"
        return guards.change() or asked or self._seen_otherwise(guards, leaves)

    @staticmethod
    def _seen_otherwise(guards: Guards, leaves: Sequence[Any]) -> str:
        return next(filter(None, (values.change(leaves) for values in guards.values)), "")

    def clear(self) -> None:
        self._latest = None, ()
        self._known.clear()
        self._made.clear()


def check_whole_batches(guards: Guards, program: AnyProgram, model: nn.Module) -> None:
    """Raise TraceError where Python looks at values of the batch, and a call does not have all rows of it.

    A value that only buffers decide is the same for all parts, unless forward writes into one of them.
    """
    plan, mesh = program.plan, program.mesh
    parts = {
        "a mesh with pp": mesh.is_pipelined,
        "Plan(microbatches=)": plan.microbatches > 1,
        "Plan(inputs='local')": plan.inputs == "local" and mesh.world_size > 1,
    }
    choice = next((name for name, chosen in parts.items() if chosen), None)
    if choice is None:
        return
    written = program.written_buffers
    names = {(id(module._buffers), key): name for name, module, key in _buffers(model)}
    for values in guards.values:
        reads = {names.get((id(one[0]), one[1]), "") for one in values.sources if not isinstance(one, int)}
        if any(isinstance(one, int) for one in values.sources):
            reason = "That is looked at before each call, on the whole batch"
        elif reads & written:
            reason = f"'{min(reads & written)}', a buffer that forward writes into, decides it"
        else:
            continue
        lines = "\n".join(f"  at {line}" for line in list(dict.fromkeys(look.line for look in values.looks))[:3])
        raise TraceError(
            f"what the model does next depends on the values in a tensor\n{lines}\n"
            f"{reason}, and {choice} works on parts of it.\n"
            "Way out: torch.where or a mask instead of 'if'; pass a number that is looked at as an argument of forward."
        )


def check_answers(guards: Guards, program: AnyProgram, whole: Sequence[Any], leaves: Sequence[Any]) -> None:
    """Raise TraceError where forward asks inputs for what a part of them answers otherwise than all of them.

    ``whole``: the arguments for which ``program`` was traced; ``leaves``: those that were passed.
    """
    if not guards.inputs:
        return
    is_whole = answers_of(guards.inputs, whole) == answers_of(guards.inputs, leaves)
    if is_whole and (program.plan.microbatches == 1 or not unusual_answers(guards.inputs, leaves)):
        return
    raise TraceError(
        f"forward asks of its inputs {told(guards.inputs)}, and a part of these inputs answers otherwise than all of "
        f"them: the plan works on parts (inputs={program.plan.inputs!r}, microbatches={program.plan.microbatches}), "
        "or inputs were made in inference_mode\n"
        "Way out: x.clone(memory_format=torch.contiguous_format) of the inputs, or pass what the model is to do as an "
        "argument."
    )


def _buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, its name there) of each buffer."""
    for path, module in model.named_modules():
        for key in module._buffers:
            yield f"{path}.{key}" if path else key, module, key
