"""The programs of one parallel module, by kind of call: compiled, agreed on by the ranks, bound; the oldest goes."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopar.autodiff.autograd import alone_in_autograd
from autopar.calls.call_sizes import general
from autopar.calls.calls import Call, global_call, ordinary, shapes
from autopar.calls.compile_times import CompileTimes
from autopar.calls.entry import Bound, Entry
from autopar.calls.given_programs import GivenPrograms
from autopar.calls.known_families import Member
from autopar.calls.local_parts import check_parts, check_parts_of_ranks, explained
from autopar.calls.missing_outputs import MissingOutputs
from autopar.calls.repeated_calls import RepeatedCall
from autopar.calls.shared_inputs import check_shared_inputs
from autopar.calls.size_families import Ask, Fit, SizeFamilies
from autopar.calls.torch_settings import outside_inference, torch_settings
from autopar.calls.unequal_rows import joined, said
from autopar.calls.variants import Variants, check_answers
from autopar.communication.agreement import SAME_CALLS, Said, UnequalRows, digest_of, told
from autopar.communication.connect import Connection
from autopar.communication.freed_memory import give_back
from autopar.dtensors.dtensor_habits import shown_parts
from autopar.errors import RanksDifferError
from autopar.ir.asked_of_inputs import unusual_answers
from autopar.ir.collection import no_collection
from autopar.ir.fingerprint import CallFacts
from autopar.ir.guards import Guards
from autopar.ir.layout import Layout
from autopar.ir.model_runs import no_other_runs, runs_so_far
from autopar.ir.program import AnyProgram, PipelinedProgram
from autopar.mesh import Mesh
from autopar.notes import is_mute
from autopar.pipeline.microbatches import Weight
from autopar.plan import Plan
from autopar.runtime.accumulate import Accumulation
from autopar.runtime.execute import Executable
from autopar.runtime.execute_pipeline import PipelineExecutable, open_groups
from autopar.weights.parameters import ALONE, Weights

PROGRAMS_KEPT = 64

# (whole call, layouts held, a program of another call that decides alike, whether nobody has asked for it) ->
Compile = Callable[[Call, Mapping[str, Layout] | None, AnyProgram | None, bool], tuple[AnyProgram, Guards]]
Kind = tuple[Hashable, int]  # of call, and which variant of its program
Again = tuple[Executable, list[Tensor]]
Work = Callable[[Executable, list[Tensor]], Any]  # (program, tensors of the call) ->

DIFFERENT = "the ranks do not do the same:"
logger = logging.getLogger("autopar")


class ProgramCache:
    """The cache.

    ``weights`` are laid out by the first program. ``facts`` gives what a fingerprint says of a call, ``asked`` what
    forward asks about its sizes; ``fitted`` makes a family. ``packs_padding``: some layer computes otherwise where no
    gradient is required. ``given``: programs that were compiled before. ``prove``: raises for a wrong one of a family.
    """

    def __init__(
        self,
        compiled: Compile,
        mesh: Mesh,
        plan: Plan,
        weights: Weights,
        accumulation: Accumulation,
        facts: Callable[[Call], CallFacts],
        asked: Ask,
        fitted: Fit,
        packs_padding: bool = False,
        given: GivenPrograms | None = None,
        prove: Callable[[AnyProgram, Sequence[Any], Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._compiled, self._mesh, self._plan = compiled, mesh, plan
        self._weights, self._connection = weights, weights.connection
        self._accumulation, self._packs_padding, self._given, self._prove = accumulation, packs_padding, given, prove
        self.families = SizeFamilies(partial(self._compile, unasked=True), facts, mesh, plan, asked, fitted)
        self._of_original: AnyProgram | None = None  # where the module is a copy
        self._weight: Weight | None = None  # of the calls now
        self._members = dict[Kind, Member]()
        self._programs: OrderedDict[Kind, AnyProgram] = OrderedDict()  # the latest used last
        self._bound: dict[Kind, Entry] = {}
        self._latest: tuple[Kind, Entry] | None = None  # of the last call: kinds are large, and take time to look up
        self._is_alone, self._asks_for_gradients = mesh.world_size == 1, False  # the latter: does forward
        self._asked_of_inputs = list[str]()
        self._variants, self._compiles, self._missing = Variants(), CompileTimes(), MissingOutputs()

    def __len__(self) -> int:
        return len(self._programs)

    @property
    def latest(self) -> AnyProgram | None:
        """The program of the latest kind of call; before there was one, the original's, or the first that was given."""
        first = self._given.programs[0] if self._given is not None else self._of_original
        return next(reversed(self._programs.values()), first)

    @property
    def latest_bound(self) -> Bound | None:
        """The bound program of :attr:`latest`; None before it has run."""
        entry = self._bound.get(next(reversed(self._programs))) if self._programs else None
        return entry.bound if entry is not None else None

    def learn(self, other: ProgramCache) -> None:
        """Know the latest program of a module that was copied; it is not run, as its guards are of other objects."""
        self._of_original = other.latest

    def clear(self) -> None:
        self._programs.clear()
        self._members.clear()
        self.families.clear()
        self._bound.clear()
        self._latest = None
        self._variants.clear()

    def prepared(self, call: Call, training: bool) -> AnyProgram:
        """The program of a call on this rank; it is compiled if there is none."""
        with outside_inference():
            whole = global_call(ordinary(call), self._mesh, self._plan)
        with explained(call, whole, self._mesh, self._plan), outside_inference():
            return self._program(self._kind(call, training), whole, training, call.leaves)

    def of_whole(self, call: Call, training: bool) -> AnyProgram:
        """The program of a call that has the whole batch, whatever ``plan.inputs`` says."""
        local = self._plan.inputs == "local"
        return self._program(self._kind(call, training, "whole" if local else ""), call, training, call.leaves)

    def bound(self, call: Call, training: bool) -> Bound:
        """The bound program of this call on this rank.

        Collective for a new kind of call. Raises the errors of the compiler, and LaunchError where ranks have different
        programs.
        """
        return self._entry(call, training).bound

    def _entry(self, call: Call, training: bool) -> Entry:
        self._missing.check(call)
        kind = self._kind(call, training) if self._is_alone else self._agreed_kind(call, training)
        entry = self._known(kind)
        if entry is None:
            entry = self._bound[kind] = Entry(self._new(call, training, kind), digest_of(kind))
            self._missing.learn(entry.bound.program)
        if self._latest is None or kind is not self._latest[0]:
            self._programs.move_to_end(kind)
            self._latest = kind, entry
        entry.calls += 1
        return entry

    def _known(self, kind: Kind) -> Entry | None:
        latest = self._latest
        return latest[1] if latest is not None and kind is latest[0] else self._bound.get(kind)

    def again(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Again | None:
        """On one rank, for a call that is like the latest one: its program and tensors. None for any other."""
        (kind, variant), entry = self._latest or ((None, 0), None)
        if entry is None or entry.repeated is None or self._weight is not None:
            return None
        tensors = entry.repeated.tensors_of(args, kwargs, training)
        if tensors is None or self._variants.number(kind, (*args, *kwargs.values())) != variant:
            return None
        entry.calls += 1
        assert isinstance(entry.bound, Executable)
        return entry.bound, tensors

    def run(self, call: Call, training: bool, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output for ``call``, made of ``args`` and ``kwargs``; collective. Raises as :meth:`bound`."""
        if not self._is_alone:
            return self._on_all_rows(call, training, lambda program, tensors: program.run(tensors, seed, self._weight))
        executable = self.executable(call, training)
        may_repeat = not self._packs_padding and not self._missing.passed(call)
        if self._latest is not None and self._latest[1].calls == 1 and may_repeat:
            self._latest[1].repeated = RepeatedCall.of(args, kwargs, call, training, self._weights.requires_grad)
        return executable.run(call.tensors, seed, self._weight)

    @contextmanager
    def weighing(self, weight: Weight | None) -> Iterator[None]:
        """Within this context a call counts for ``weight`` in a batch: also where a hook is to see it."""
        before, self._weight = self._weight, weight
        try:
            yield
        finally:
            self._weight = before

    def loss(self, call: Call, training: bool, seed: int, weight: Weight | None) -> Tensor:
        """The loss for ``call``, as :meth:`Executable.loss` has it; collective. Raises the errors of :meth:`bound`."""
        if self._is_alone:
            return self.executable(call, training).loss(call.tensors, seed, weight)
        work = partial(Executable.loss, seed=seed, weight=weight)
        found: Tensor = self._on_all_rows(call, training, work, gives_outputs=False)
        return found

    def executable(self, call: Call, training: bool) -> Executable:
        bound = self._entry(call, training).bound
        assert isinstance(bound, Executable)
        return bound

    def _on_all_rows(self, call: Call, training: bool, work: Work, gives_outputs: bool = True) -> Any:
        """What ``work`` makes of the program of a call and its tensors: all ranks' where their rows are unequal."""
        entry = None
        try:
            entry = self._entry(call, training)
            return self._worked(work, entry, call)
        except UnequalRows as problem:
            if entry is not None:
                entry.calls -= 1  # ranks that heard of it earlier have not counted this call
            whole = joined(call, problem, self._required_connection, self._plan)
        entry = self._entry(whole.call, training)
        if gives_outputs:
            whole.check_outputs(entry.bound.program, self._mesh)
        return self._worked(work, entry, whole.call)

    def _worked(self, work: Work, entry: Entry, call: Call) -> Any:
        assert isinstance(entry.bound, Executable)
        found = work(entry.bound, call.tensors)
        self._required_connection.comm.agreement.settle()  # where the program has no collective that would wait for it
        return found

    def _agreed_kind(self, call: Call, training: bool) -> Kind:
        """The kind of this call, which the ranks compare, and when it is due what they pass.

        Raises RanksDifferError; IndivisibleError where ranks pass parts of different sizes. Where nothing is due, the
        answer is not waited for here, except on a pipeline.
        """
        comm = self._required_connection.comm
        while True:
            kind = self._kind(call, training)
            entry = self._known(kind)
            due = entry is None or entry.is_due
            number = entry.number if entry is not None else digest_of(kind)
            described = partial(self._described, call, training, number, kind)
            comm.agreement.start(number + due, described, SAME_CALLS, note=shown_parts())
            if not due and not self._mesh.is_pipelined:
                return kind
            if comm.agreement.agrees():
                break
            self._blame(call, self._described(call, training, number, kind))
        if due and not call.rows_of_all:
            check_shared_inputs(call, self._required_connection, self._plan)
        return kind

    def _blame(self, call: Call, mine: str) -> None:
        """Raise an error that says which ranks make which call, unless stages had to hear of each other's parameters.

        Every rank calls this at the same time, when they have heard that they do not do the same.
        """
        connection = self._required_connection
        everyone = connection.comm.agreement.everyone((mine, self._weights.flags()))
        UnequalRows.check(everyone)
        others = [said for said in everyone if isinstance(said, str)]
        if others or not all(isinstance(said, tuple) for said in everyone):
            way_out = ALONE if "state_dict()" in others else SAME_CALLS
            raise RanksDifferError(f"{DIFFERENT}\n{told(everyone)}\nWay out: {way_out}")
        if self._mesh.is_pipelined and self._weights.learn_flags([flags for _, flags in everyone]):
            return
        if self._plan.inputs == "local":
            check_parts_of_ranks(call, connection, self._plan)
        raise RanksDifferError(f"{DIFFERENT}\n{told(everyone)}\nWay out: {SAME_CALLS}")

    def _described(self, call: Call, training: bool, number: int, kind: Kind) -> Said:
        """One kind of call, for messages and other ranks; ``number`` tells apart those that look alike."""
        mode = "a call to train" if training else "a call to evaluate"
        inputs = ", ".join(f"{name or 'input'} {list(tensor.shape)}" for name, tensor in call.named_tensors)
        change = self._variants.change(kind[0], call.leaves)
        text = f"{mode}, {inputs} (program {number % 10**6:06d}{', since ' if change else ''}{change})"
        return said(text, call, (self._other_facts(training), change), self._mesh, self._plan)

    @property
    def _required_connection(self) -> Connection:
        assert self._connection is not None, "only a launched module runs programs"
        return self._connection

    @no_collection()
    def _new(self, call: Call, training: bool, kind: Kind) -> Bound:
        connection = self._required_connection
        laid_out = self._weights.is_laid_out
        with no_other_runs(), alone_in_autograd():
            program = self.prepared(call, training)
        self._variants.number(kind[0], call.leaves)  # asks in the mode of the caller, in which nothing is traced
        member = self._members.get(kind)
        check_parts(program, call)
        if member is None:
            connection.agree(program)
        elif not member.code.agreed:
            connection.agree(member.code.family.template)
            open_groups(member.code.family.template, connection.comm)
            member.code.agreed = True
        if laid_out and not self._bound:
            self._weights.check_copies()
        if isinstance(program, PipelinedProgram):
            stages = partial(member.code.of_stage, member.numbers) if member is not None else None
            return PipelineExecutable(program, self._weights.root, connection, stages)
        code = member.code.of_model(member.numbers) if member is not None else None
        return Executable(program, self._weights.root, connection, self._accumulation, code)

    def _other_facts(self, training: bool) -> tuple[Hashable, ...]:
        """What determines a program beside the call."""
        packs = self._packs_padding and not torch.is_grad_enabled()
        return training, *torch_settings(), self._weights.requires_grad(), packs

    def _kind(self, call: Call, training: bool, batch: str = "") -> Kind:
        kind: Hashable = (self._other_facts(training), call.key, batch, call.rows_of_all)
        latest = self._latest[0] if self._latest is not None else None
        is_latest = latest is not None and kind == latest[0]
        if latest is not None and is_latest:
            kind = latest[0]
        number = self._variants.number(kind, call.leaves)
        if latest is not None and is_latest and number == latest[1]:
            return latest
        if number is None and self._weights.take_in():
            return self._kind(call, training, batch)
        return kind, self._variants.next(kind) if number is None else number

    def _general_kind(self, kind: Kind, call: Call, training: bool) -> tuple[Hashable, ...]:
        """That of all sizes, with what forward is known to ask beside them."""
        mode = self._asks_for_gradients and not torch.is_grad_enabled(), kind[0][-2]  # type: ignore[index]
        asked = unusual_answers(self._asked_of_inputs, call.leaves)
        return *self._other_facts(training), *mode, asked, general(call)

    def _program(self, kind: Kind, call: Call, training: bool, leaves: Sequence[Any]) -> AnyProgram:
        """That of a whole ``call``, which is the caller's own but for what is asked of the arguments, ``leaves``."""
        if kind in self._programs:
            return self._programs[kind]
        program = self._given.of(call) if self._given is not None else None
        general_kind = self._general_kind(kind, call, training)
        if program is None and self._given is not None and self.families.like(general_kind) is None:
            family = self._given.family_of(call)
            if family is not None:
                self.families.adopt(general_kind, family, self._given.guards(family.template))
        member = self.families.member(general_kind, call) if program is None else None
        if program is None and member is None:
            member = self.families.grown(general_kind, call)
        if program is None and member is None and (self._connection is None or self._connection.rank == 0):
            self._tell(kind, call, training)
        while len(self._programs) >= PROGRAMS_KEPT:
            oldest, _ = self._programs.popitem(last=False)
            self._bound.pop(oldest, None)
            self._members.pop(oldest, None)
            self._variants.remove(*oldest)
        guards = self._given.guards(program) if self._given is not None and program is not None else Guards()
        if program is None:
            if member is not None:
                self._prove_member(member, call)
                program, guards, self._members[kind] = member.program, member.guards, member
            else:
                program, guards = self._compile(call, self.families.like(general_kind))
                self._learn(guards)
                self.families.learn(self._general_kind(kind, call, training), call, program, guards)
                self._compiles.tell_many(PROGRAMS_KEPT, self.families.why_none)
                learnt = self.families.member(general_kind, call) if self._plan.compile == "inductor" else None
                if learnt is not None:  # whose regions serve all lengths, and those of the program one
                    program, guards, self._members[kind] = learnt.program, learnt.guards, learnt
        self._learn(guards)
        check_answers(guards, program, call.leaves, leaves)
        self._weights.lay_out(program)  # before it is kept: a program that requires other layouts never runs
        self._programs[kind], self._latest = program, None
        self._variants.add(*kind, guards, leaves)
        return program

    def _learn(self, guards: Guards) -> None:
        self._asks_for_gradients |= guards.ask_for_gradients
        self._asked_of_inputs += [name for name in guards.inputs if name not in self._asked_of_inputs]

    def _prove_member(self, member: Member, call: Call) -> None:
        if self._prove is not None:  # Plan(verify=True)
            with self._weights.given_back_on_failure(), self._weights.traceable():
                self._prove(member.program, call.args, call.kwargs)

    def _compile(self, call: Call, like: AnyProgram | None, unasked: bool = False) -> tuple[AnyProgram, Guards]:
        pinned, before = self._weights.pinned, runs_so_far()
        start = time.perf_counter()
        with self._weights.given_back_on_failure(), self._weights.traceable():
            found = self._compiled(call, pinned, like, unasked)
        if runs_so_far() > before:  # a program that was found frees next to nothing
            give_back()
        self._compiles.seconds.append(time.perf_counter() - start)
        return found

    def _tell(self, kind: Kind, call: Call, training: bool) -> None:
        """Say once for each kind of call that, and why, it is compiled, where that was not to be expected."""
        if is_mute():
            return
        change = self._variants.change(kind[0], call.leaves)
        if change:
            logger.warning("making another program: %s", change)
        elif self._given is not None:
            logger.warning("making another program: %s", self._given.none_of(call))
        elif self._programs:
            name = "training" if training else "evaluation"
            logger.warning("a new kind of call (%s, inputs %s): making another program", name, shapes(call.tensors))
