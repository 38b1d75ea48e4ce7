"""What torch makes of a call, forward and backward: listened to once for all calls that are alike.

    mul(a, b) of f32[4,8] and f32[4,8], contiguous, both with a gradient
      forward              0 = a, 1 = b;  2 = mul(0, 1)
      backward of 2 (3)    4 = mul(3, 1), given to a;  5 = mul(3, 0), given to b

Calls are alike when they have the same operator, numbers, and tensors of the same sizes, strides and dtypes. What a
record cannot say (that an operand is written into, a view by an offset in memory) raises :class:`Unheard`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from autopar.autodiff.autograd import without_anomalies
from autopar.autodiff.outline import Outline
from autopar.autodiff.recorder import TENSORS, Recorder, fake_mode
from autopar.ir.operator_facts import writes
from autopar.mesh import Mesh

aten = torch.ops.aten

Run = Callable[[Recorder, Any, Any], Any]


class Unheard(Exception):
    """Something that no record of a call can say: the program has to be recorded as a whole."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among those of a call: operands first, then what the call makes."""

    number: int


@dataclass(frozen=True)
class Made:
    """How a tensor looks that a call makes. ``memory``: the number of an operand's memory, or of a new one;
    ``offset``: from where that operand begins."""

    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    memory: int
    offset: int
    requires_grad: bool


@dataclass(frozen=True)
class Step:
    """An operator below autograd; ``target`` None: ``result`` is another name of ``args[0]``.

    Of an operator that writes into ``args[0]``, ``result`` is all names of that."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any


@dataclass(frozen=True)
class Given:
    """A gradient goes to the operand of that number."""

    operand: int
    gradient: Slot


@dataclass
class Heard:
    """``steps`` of a call or of its derivative, in their order, and what they make, in the order of the slots."""

    steps: tuple[Step | Given, ...]
    made: tuple[Made, ...]


@dataclass
class Record:
    """Of one call. ``result``: its structure, with slots. ``backward``: by how the gradients of ``outputs`` look."""

    heard: Heard
    result: Any
    outputs: tuple[int, ...]  # slots of what it makes and returns, and what gradients flow through
    listen: Callable[[], _Listening]  # once more
    listening: _Listening | None  # whose backward has not run yet
    backward: dict[Any, Heard] = field(default_factory=dict)

    def derivative(self, gradients: Sequence[Outline | None]) -> Heard:
        """The steps of backward; ``gradients`` of ``outputs``, which get the slots after those of forward."""
        key = tuple(None if one is None else one.kind for one in gradients)
        if key not in self.backward:
            listening, self.listening = self.listening or self.listen(), None
            self.backward[key] = listening.derivative(self.outputs, gradients)
        return self.backward[key]


class Calls:
    """The records of the calls of a program, or of all stages of one. Leaving it frees what torch saved for backward:
    an operator that saves its own result holds itself, and no collector sees that."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self._mode = mesh, fake_mode()
        self._known: dict[Any, Record] = {}

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        for record in self._known.values():
            if record.listening is not None and record.outputs:
                made = [record.listening.tensors[number] for number in record.outputs]
                with suppress(Exception):  # nobody wants the result
                    record.derivative([Outline(one.dtype, one.shape, one.stride(), -1) for one in made])
        self._known.clear()

    def record(self, run: Run, name: Any, args: Any, kwargs: Any) -> Record:
        """What ``run(recorder, args, kwargs)`` does, where the arguments may contain outlines; ``name`` tells it from
        others."""
        key = (name, _key(args), _key(kwargs))
        found = self._known.get(key)
        if found is None:
            operands = list(outlines((args, kwargs)))

            def listen() -> _Listening:
                listening = _Listening(self.mesh, self._mode, operands)
                listening.forward(run, args, kwargs)
                return listening

            try:
                found = self._known[key] = listen().record_of(listen)
            except Exception as problem:  # whatever it is, recording the whole program meets it too, or does not
                raise Unheard(f"{name}: {problem}") from problem
        return found


def outlines(item: Any) -> Iterator[Outline]:
    """In their order, each as often as it occurs."""
    if isinstance(item, Outline):
        yield item
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from outlines(part)
    elif isinstance(item, dict):
        for part in item.values():
            yield from outlines(part)


def _key(item: Any) -> Any:
    """What makes two arguments alike; 1, 1.0 and True are not."""
    if isinstance(item, Outline):
        return (item.kind, item.requires_grad)
    if isinstance(item, (list, tuple)):
        return (type(item), *map(_key, item))
    if isinstance(item, dict):
        return tuple((name, _key(part)) for name, part in item.items())
    return (type(item), repr(item) if isinstance(item, float) else item)  # -0.0 equals 0.0


class _Listening(Recorder):  # type: ignore[no-untyped-call]
    """Notes the operators below autograd, in place of writing a graph. Operands that are the same tensor are told
    apart: each use of it has a gradient of its own."""

    def __init__(self, mesh: Mesh, mode: Any, operands: Sequence[Outline]) -> None:
        super().__init__(fx.Graph(), mesh)
        self.mode = mode
        self.result: Any = None
        self.steps: list[Step | Given] = []
        self.tensors: list[Tensor] = []  # by slot
        self.numbers: dict[int, int] = {}  # id(tensor) -> slot
        self.memories: dict[int, int] = {}  # storage -> its number: of operands, that of the operand
        with mode:
            self.leaves = [_like(one).requires_grad_(one.requires_grad) for one in operands]
        for leaf in self.leaves:
            self._add(leaf)
        self.borrowed = frozenset(self.memories)  # which others see too
        self.sums: dict[int, Tensor] = {}  # of an operand's gradients so far, where several steps of autograd give one
        self.awaited: deque[tuple[int, Tensor]] = deque()  # what is to be added to them next

    # ------------------------------------------------------------ forward and backward

    def forward(self, run: Run, args: Any, kwargs: Any) -> None:
        leaves = iter(self.leaves)
        given = _replaced((args, kwargs), lambda _: next(leaves))
        with self.mode, self:
            self.result = run(self, *given)

    def record_of(self, listen: Callable[[], _Listening]) -> Record:
        """Of the forward that has run."""
        slots = pytree.tree_map(lambda item: self.slot(item) if isinstance(item, Tensor) else item, self.result)
        returned = {slot.number for slot in pytree.tree_leaves(slots) if isinstance(slot, Slot)}
        own = (number for number in sorted(returned) if number >= len(self.leaves))
        outputs = tuple(number for number in own if self.tensors[number].requires_grad)
        return Record(self._heard(len(self.leaves)), slots, outputs, listen, self if outputs else None)

    def derivative(self, outputs: Sequence[int], gradients: Sequence[Outline | None]) -> Heard:
        """Once: what torch saved for it is gone afterwards."""
        before, self.steps = len(self.tensors), []
        with self.mode:
            tangents = [torch.empty(0) if like is None else _like(like) for like in gradients]
        for tangent in tangents:
            self._add(tangent)
        self.borrowed = frozenset(self.memories)
        asked = [place for place, like in enumerate(gradients) if like is not None]
        self._derive([self.tensors[outputs[place]] for place in asked], [tangents[place] for place in asked])
        return self._heard(before + len(tangents))

    def _derive(self, outputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> None:
        handles = [step.register_hook(self._giving(edges)) for step, edges in self._last_steps(outputs)]
        reached = [leaf for leaf in self.leaves if leaf.requires_grad]
        self.sums, self.awaited = {}, deque()
        try:
            with self.mode, self, without_anomalies():
                torch.autograd.grad(outputs, reached, tangents, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        if self.awaited:
            raise Unheard("gradients that are not added up as they arrive")

    def _last_steps(self, outputs: Sequence[Tensor]) -> Iterator[tuple[Any, list[int | None]]]:
        """The steps of autograd that reach operands; for each of the gradients that it gives, the number of one."""
        waiting = [output.grad_fn for output in outputs]
        seen = set[Any]()
        while waiting:
            step = waiting.pop()
            if step is None or step in seen:
                continue
            seen.add(step)
            waiting += [source for source, _ in step.next_functions]
            leaves = [getattr(source, "variable", None) for source, _ in step.next_functions]
            if any(leaf is not None for leaf in leaves):
                yield step, [None if leaf is None else self.numbers[id(leaf)] for leaf in leaves]

    def _giving(self, operands: Sequence[int | None]) -> Callable[[Sequence[Any], Any], None]:
        """A hook of a step of autograd. What it gives an operand is a part: torch adds those up, and here others do."""

        def note(gradients: Sequence[Any], _: Any) -> None:
            for number, gradient in zip(operands, gradients, strict=True):
                if number is None:
                    continue
                if gradient is None:
                    raise Unheard("an operand without a gradient")
                self.steps.append(Given(number, self.slot(gradient)))
                if number in self.sums:
                    self.awaited.append((number, gradient))
                else:
                    self.sums[number] = gradient

        return note

    def _is_sum(self, func: Any, args: Sequence[Any], result: Any) -> bool:
        """Whether torch adds up two gradients of an operand."""
        if not self.awaited or func is not aten.add.Tensor:
            return False
        number, gradient = self.awaited[0]
        if args[0] is not self.sums[number] or args[1] is not gradient:
            return False
        self.awaited.popleft()
        self.sums[number] = result
        return True

    def _heard(self, first: int) -> Heard:
        made = []
        for tensor in self.tensors[first:]:
            memory, offset = self.memories[self.memory(tensor)], int(tensor.storage_offset())
            look = tensor.dtype, tensor.shape, tensor.stride()
            made.append(Made(*look, memory, offset, tensor.requires_grad))
        return Heard(tuple(self.steps), tuple(made))

    # ------------------------------------------------------------ what it hears

    def slot(self, tensor: Tensor) -> Slot:
        number = self.numbers.get(id(tensor))
        if number is None:
            raise Unheard("a tensor from outside the call")
        return Slot(number)

    def _add(self, tensor: Tensor) -> Slot:
        if id(tensor) not in self.numbers:
            if tensor.is_conj() or tensor.is_neg():
                raise Unheard("a lazy conjugate")
            self.numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.memories.setdefault(self.memory(tensor), len(self.memories))
        return self.slot(tensor)

    def record(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if func is aten.as_strided.default:
            raise Unheard("a view by an offset in memory")
        if isinstance(result, (Tensor, tuple, list)) and not self._is_sum(func, args, result):
            made = pytree.tree_map(lambda item: self._add(item) if isinstance(item, Tensor) else item, result)
            given, kwargs = _replaced((tuple(args), kwargs), self.slot)
            self.steps.append(Step(func, given, kwargs, made))

    def identity(self, func: Any, source: Tensor) -> Tensor:
        if id(source) not in self.numbers:
            return self.constant(source)
        result: Tensor = aten.alias.default(source)
        self.steps.append(Step(None, (self.slot(source),), {}, self._add(result)))
        return result

    def in_place(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        changed = args[0]
        memory = self.memory(changed)
        same = [tensor for tensor in self.tensors if self.memory(tensor) == memory]
        if memory in self.borrowed or any(self.geometry(tensor) != self.geometry(changed) for tensor in same):
            raise Unheard(f"{func} changes a tensor that others may see")
        given, kwargs_given = _replaced((tuple(args), kwargs), self.slot)
        self.steps.append(Step(func, given, kwargs_given, tuple(map(self.slot, same))))
        func(*args, **kwargs)
        if self.geometry(changed) != self.geometry(same[0]) or torch.Tag.inplace_view in func.tags:
            raise Unheard(f"{func} changes the sizes of a tensor")
        return changed


def _like(outline: Outline) -> Tensor:
    return torch.empty_strided(outline.shape, outline.strides, dtype=outline.dtype)


def _replaced(item: Any, instead: Callable[[Any], Any]) -> Any:
    """``item`` with another thing in place of each tensor, outline or slot."""
    if isinstance(item, (Slot, *TENSORS)):
        return instead(item)
    if isinstance(item, (list, tuple)):
        return type(item)(_replaced(part, instead) for part in item)
    if isinstance(item, dict):
        return {name: _replaced(part, instead) for name, part in item.items()}
    return item


# ------------------------------------------------------------ once more


class Replayed:
    """A call that runs once more, from its record, on ``operands``; ``memories`` numbers what is new."""

    def __init__(self, record: Record, operands: Sequence[Outline], memories: Iterator[int]) -> None:
        self.record, self._memories = record, memories
        self.tensors = list(operands)
        self._bases = [(one.memory, one.offset) for one in operands]  # by the number of a memory

    def forward(self, recorder: Recorder) -> Any:
        """Its result."""
        made = iter(self.record.heard.made)
        for step in self.record.heard.steps:
            assert isinstance(step, Step)
            self._again(step, made, recorder)
        return _replaced(self.record.result, self._tensor)

    @property
    def outputs(self) -> list[Outline]:
        return [self.tensors[number] for number in self.record.outputs]

    def backward(
        self, gradients: Sequence[Outline | None], recorder: Recorder, give: Callable[[Outline, Outline], None]
    ) -> None:
        """``give(operand, gradient)`` is called as each is there."""
        heard = self.record.derivative(gradients)
        for gradient in gradients:
            self.tensors.append(gradient or self.tensors[0])
            self._bases.append((gradient.memory, gradient.offset) if gradient else (-1, 0))
        made = iter(heard.made)
        for step in heard.steps:
            if isinstance(step, Given):
                give(self.tensors[step.operand], self._tensor(step.gradient))
            else:
                self._again(step, made, recorder)

    def _tensor(self, slot: Slot) -> Outline:
        return self.tensors[slot.number]

    def _again(self, step: Step, made: Iterator[Made], recorder: Recorder) -> None:
        args, kwargs = _replaced((step.args, step.kwargs), self._tensor)
        result = _replaced(step.result, lambda slot: self._made(slot, made))
        if step.target is None:
            recorder.same(args[0], result)
        elif writes(step.target):
            recorder.changed(step.target, args, kwargs, result)
        else:
            recorder.record(step.target, args, kwargs, result)

    def _made(self, slot: Slot, made: Iterator[Made]) -> Outline:
        if slot.number < len(self.tensors):
            return self.tensors[slot.number]
        look = next(made)
        if look.memory == len(self._bases):
            self._bases.append((next(self._memories), 0))
        memory, offset = self._bases[look.memory]
        made_now = Outline(look.dtype, look.shape, look.strides, memory, offset + look.offset, look.requires_grad)
        self.tensors.append(made_now)
        return made_now
