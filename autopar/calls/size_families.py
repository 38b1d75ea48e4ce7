"""The families of the programs of one module, by kind of call: made when lengths vary, and grown.

At the second length of a kind of call two more programs are compiled, for a greater and a smaller one, and the four are
fitted; where forward rounds sizes, or several lengths vary, two more beside them. From then on a length inside of the
family costs no compile; one outside is one compile, by which the family grows. Where the programs are no family, each
length is compiled for itself; those with one row for each rank may make a family of their own then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from autopar.calls.call_sizes import resized, shapes_of
from autopar.calls.calls import Call, class_of
from autopar.calls.known_families import Kept, Known, Member, Round
from autopar.families.family import Family, Point, fit
from autopar.families.forms import NoForm, Sizes
from autopar.families.refusals import is_refusal
from autopar.families.sizes import BATCH, OTHER, SEQUENCE, Place, Scheme, Shapes, between, further, in_steps, reaching
from autopar.families.tied import never_one, ties
from autopar.families.walk import numbers_of
from autopar.ir.asked_of_inputs import unusual_answers
from autopar.ir.batch import data_ways, input_dims
from autopar.ir.fingerprint import CallFacts
from autopar.ir.guards import Guards
from autopar.ir.program import AnyProgram
from autopar.ir.size_conditions import Condition, Dims, rounded_in
from autopar.mesh import SEQUENCE as SEQUENCE_AXIS
from autopar.mesh import Mesh
from autopar.notes import warn
from autopar.plan import Plan
from autopar.runtime.family_code import FamilyCode

FEWEST = 3  # points of a family: with fewer nothing checks an expression
ROUNDS = 2  # of further points for one kind of call, where the first make no family
POINTS_KEPT = 6

FAILED = (
    "compiling for another length failed, so that each length may be compiled for itself: {!r}\n"
    'Way out: report this, it is a fault of autopar; Plan(lengths="each") tries no other lengths.'
)

Compiled = tuple[AnyProgram, Guards]
Compile = Callable[[Call, AnyProgram | None], Compiled]  # (call, a program that decides alike) ->
Fit = Callable[[Sequence[Point], Scheme], Family]  # as :func:`autopar.families.family.fit`
Ask = Callable[[Call, Dims, Sizes], Sequence[Condition]]  # (call, dims, sizes) -> what the model asks about them

logger = logging.getLogger("autopar")


class SizeFamilies:
    """Those of one module on ``mesh`` with ``plan``. All ranks make the same ones, since they make the same calls.

    ``compiled`` makes a program; ``facts`` gives what a fingerprint says of a call; ``asked`` what forward asks about
    its sizes; ``fitted`` makes a family.
    """

    def __init__(
        self,
        compiled: Compile,
        facts: Callable[[Call], CallFacts],
        mesh: Mesh,
        plan: Plan,
        asked: Ask,
        fitted: Fit = fit,
    ) -> None:
        self._compiled, self._facts, self._mesh, self._plan = compiled, facts, mesh, plan
        self._asked, self._fit = asked, fitted
        self._rows_at_once = data_ways(mesh) * plan.microbatches  # where each rank, and microbatch, has one
        self._kept: dict[tuple[Hashable, bool], Kept] = {}  # by the kind of call, and whether ranks have one row each
        self._parted = set[Hashable]()  # kinds of which that makes a difference
        self.why_none = ""  # there is no family for the latest call that was learnt

    def clear(self) -> None:
        self._kept.clear()
        self._parted.clear()

    @property
    def families(self) -> tuple[Family, ...]:
        """All that there are now."""
        return tuple(known.family for kept in self._kept.values() for known in kept.families)

    def like(self, kind: Hashable) -> AnyProgram | None:
        """A program of another call of this kind, whose decisions are kept."""
        kept = (self._held(kind, has_one_row) for has_one_row in (False, True))
        return next((one.first for one in kept if one is not None), None)

    def member(self, kind: Hashable, call: Call) -> Member | None:
        """The program of a call that is in a family."""
        kept = self._of(kind, call)
        found = (self._in(known, call) for known in kept.families) if kept is not None else ()
        return next((member for member in found if member is not None), None)

    def grown(self, kind: Hashable, call: Call) -> Member | None:
        """As :meth:`member`, once a family has grown by one compile; None where no family could hold this call."""
        kept = self._of(kind, call)
        for known in kept.families if kept is not None else ():
            sizes = known.scheme.sizes(shapes_of(call))
            if sizes is None or not known.family.could_hold(sizes):
                continue
            reached = reaching(sizes, known.family.ranges, known.family.is_alike)
            if reached != sizes and self._extend(known, call, reached):
                found = self._in(known, call)
                if found is not None:
                    return found
        return None

    def adopt(self, kind: Hashable, family: Family, guards: Guards) -> None:
        """Take a family that was made before, with what it assumes, for calls of this kind."""
        assert family.scheme is not None, "a family without the dims of a call"
        known = Known(family, FamilyCode(family), family.scheme, guards)
        self._kept[kind, False] = Kept(family.template, guards, [known])

    def learn(self, kind: Hashable, call: Call, program: AnyProgram, guards: Guards) -> None:
        """A program was compiled for ``call``. Where lengths vary this compiles more of them, and makes a family."""
        if self._plan.lengths == "each":
            self.why_none = 'Plan(lengths="each")'
            return
        if guards.values:  # which depends on all of them
            self.why_none = "Python looks at values in tensors"
            return
        if unusual_answers(guards.inputs, call.leaves) or any(map(class_of, call.tensors)):
            self.why_none = "inputs are no tensors that were just made, and forward may ask"
            return
        kept = self._of(kind, call)
        if kept is None:
            kept = self._kept[kind, self._is_apart(kind, call)] = Kept(program, guards)
        if not kept.guards.leaves_alike(guards):
            self._note("what forward leaves in attributes differs")
            return
        shapes = shapes_of(call)
        for known in kept.families:
            sizes = known.scheme.sizes(shapes)
            larger = self._larger(known.family, known.scheme, call, program, sizes) if sizes is not None else None
            if larger is not None:
                self._replace(known, larger, guards)
                return
        kept.guards = Guards.joined([kept.guards, guards])  # of parameters as they are now, in place of the model's own
        kept.points = [*kept.points, (shapes, program)][-POINTS_KEPT:]
        if len(kept.points) > 1 and not kept.is_each:
            self._make(kept, call)
            was_tried = kept.rounds > 0 or len(kept.points) >= FEWEST
            if was_tried and not kept.families and kind not in self._parted:
                self._part(kind, kept, call)

    def _part(self, kind: Hashable, kept: Kept, call: Call) -> None:
        """Programs of one row for each rank, which make no family with the others, may make one of their own."""
        alone = [point for point in kept.points if self._has_one_row(call, point[0])]
        others = [point for point in kept.points if not self._has_one_row(call, point[0])]
        if alone and others:
            self._parted.add(kind)
            self._kept[kind, True] = Kept(alone[0][1], kept.guards, points=alone)
            kept.first, kept.points, kept.rounds = others[0][1], others, 0

    # ------------------------------------------------------------ making

    def _make(self, kept: Kept, call: Call) -> None:
        """Compile further points, if lengths vary, and fit a family of those at which the model does the same."""
        scheme = Scheme.of([shapes for shapes, _ in kept.points], self._roles(call))
        points = kept.of(scheme)
        varies = any(len({sizes[name] for sizes, _ in points}) > 1 for name in points[0][0] if name[0] != BATCH)
        if len(points) < FEWEST and not (varies and kept.rounds < ROUNDS):
            return
        without_ones = (sizes for sizes, _ in points if min(sizes.values()) > 1)  # a size of 1 is alone
        like = next(without_ones, points[0][0])
        scheme, conditions = self._completed(call, scheme, [sizes for sizes, _ in points], like)
        points = kept.of(scheme)
        like = scheme.free(like)
        kept.is_each = any(one.is_number and any(name[0] != BATCH for name in one.names) for one in conditions)
        known = [like, *(sizes for sizes, _ in points if sizes != like)]
        tried = Round(call, scheme, conditions, known, len(points), kept.rounds == 0)
        tries = varies and kept.rounds < ROUNDS and not kept.is_each
        family, scheme = self._tried_in_steps(kept, tried, points) if tries else self._family_of(tried, points)
        if family is None:
            return
        kept.families.insert(0, Known(family, FamilyCode(family), scheme, kept.guards))
        kept.rounds = 0
        kept.points = [
            (shapes, program)
            for shapes, program in kept.points
            if (own := scheme.sizes(shapes)) is None or own not in family
        ]
        logger.info("lengths vary: one program serves %s", family)

    def _tried_in_steps(
        self, kept: Kept, tried: Round, points: list[tuple[Sizes, AnyProgram]]
    ) -> tuple[Family | None, Scheme]:
        """The family of ``points`` and further ones, which are multiples of what the mesh needs.

        Where some of these have other operators, of further ones in the steps of all that are known.
        """
        units = self._units(tried.scheme)
        steps = in_steps(tried.known, units)
        if not kept.is_in_steps and steps != units:
            more, beside = self._more(kept, tried, units, points)
            family, scheme = self._family_of(tried, [*points, *more], beside, leaves_out=False)
            alike = [one for one in more if numbers_of(one[1])[1] == numbers_of(points[0][1])[1]] if not family else []
            if family is not None or len(alike) == len(more):
                return (family, scheme) if family is not None else self._family_of(tried, [*points, *more], beside)
            kept.is_in_steps, points = True, [*points, *alike]
        more, beside = self._more(kept, tried, steps, points)
        return self._family_of(tried, [*points, *more], beside)

    def _more(
        self, kept: Kept, tried: Round, unit: Mapping[str, int], points: Sequence[tuple[Sizes, AnyProgram]]
    ) -> tuple[list[tuple[Sizes, AnyProgram]], list[Sizes]]:
        """Programs of further points than ``points``, and the sizes of those that are next to the first."""
        found, beside, known = list[tuple[Sizes, AnyProgram]](), list[Sizes](), tried.known
        wanted = further(known, unit, tried.is_first, tried.holds) or further(known, unit, False, tried.holds)
        if tried.is_first and (tried.scheme.rounded or sum(name[0] != BATCH for name in known[0]) > 1):
            beside = between(known, unit, tried.holds)
            wanted += [sizes for sizes in beside if sizes not in wanted]
        kept.rounds += bool(wanted)
        for sizes in wanted:
            if sizes in [known for known, _ in points]:
                continue
            made = self._tried(kept.first, kept.guards, tried.call, tried.scheme, sizes)
            if made is not None:
                found.append((sizes, made[0]))
                kept.guards = Guards.joined([kept.guards, made[1]])
        return found, beside

    def _family_of(
        self, tried: Round, points: Sequence[tuple[Sizes, AnyProgram]], beside: Sequence[Sizes] = (),
        leaves_out: bool = True,
    ) -> tuple[Family | None, Scheme]:  # fmt: skip
        """That of ``points`` at which the model does the same, with those others that it has; None if there is none.

        ``beside``: those that tell what is rounded; ``leaves_out``: whether it may be without one of the further ones.
        """
        scheme, conditions = tried.scheme, tried.conditions
        chosen = [Point(sizes, program) for sizes, program in points if tried.holds(sizes)]
        others = [Point(sizes, program) for sizes, program in points if not tried.holds(sizes)]
        needed = sum(tried.holds(sizes) for sizes, _ in points[: tried.asked]) if leaves_out else len(points)
        if others and len(chosen) < FEWEST:
            self._note(_unlike(conditions, others[0].sizes))
        family = self._fitted(chosen, needed, scheme, conditions)
        if family is None and beside:
            scheme, why = replace(scheme, rounded={}), self.why_none
            family = self._fitted([one for one in chosen if one.sizes not in beside], needed, scheme, conditions)
            self.why_none = why
        if family is None:
            return None, tried.scheme
        for other in others:
            family = self._larger(family, scheme, tried.call, other.program, other.sizes) or family
            if other.sizes not in family:
                self._note(_unlike(conditions, other.sizes))
        return family, scheme

    def _larger(self, family: Family, scheme: Scheme, call: Call, program: AnyProgram, sizes: Sizes) -> Family | None:
        """The family that holds for ``sizes`` too; None where ``program`` is none of it."""
        if family.is_alike(sizes):
            return family.extended(program, sizes)
        if not family.agrees(program, sizes):
            return None
        asked = self._conditions(call, scheme, sizes)
        return family.extended(program, sizes, asked) if asked else None

    def _conditions(self, call: Call, scheme: Scheme, sizes: Sizes) -> Sequence[Condition]:
        """What the model asks about sizes when it is called like ``call`` with tensors of ``sizes``."""
        shapes = shapes_of(call)
        dims = [
            [scheme.names.get((tensor, dim), size) for dim, size in enumerate(shape)]
            for tensor, shape in enumerate(shapes)
        ]
        found = self._asked(resized(call, scheme.shapes(shapes, sizes)), dims, scheme.of_inputs(sizes))
        return [condition.put(scheme.tied) for condition in found] + never_one(scheme.tied, sizes)

    def _completed(
        self, call: Call, scheme: Scheme, points: Sequence[Sizes], like: Sizes
    ) -> tuple[Scheme, Sequence[Condition]]:
        """``scheme`` with the sizes that are made of others, and what the model asks of those that are left."""
        asked = self._conditions(call, scheme, like)
        tied = ties(points, asked)
        conditions = [condition.put(tied) for condition in asked]
        rounds = rounded_in(conditions) if self._plan.compile == "python" else {}
        return replace(scheme, tied=tied, rounded=rounds), [*conditions, *never_one(tied, like)]

    def _fitted(
        self, points: Sequence[Point], needed: int, scheme: Scheme, conditions: Sequence[Condition]
    ) -> Family | None:
        """The family of all points or, where they are none, of all but one beyond the first ``needed``."""
        for left_out in (None, *range(needed, len(points))):
            chosen = [point for place, point in enumerate(points) if place != left_out]
            if len(chosen) < FEWEST:
                break
            try:
                return self._fit(chosen, scheme).within(conditions)
            except NoForm as problem:
                self._note(str(problem))
        return None

    def _note(self, why: str) -> None:
        self.why_none = why
        logger.debug("no family of programs: %s", why)

    def _tried(self, like: AnyProgram, assumed: Guards, call: Call, scheme: Scheme, sizes: Sizes) -> Compiled | None:
        """The program of a call like ``call`` of other sizes; None where the model does not take those.

        Also where it leaves something else in attributes than ``assumed``.
        """
        try:
            program, guards = self._compiled(resized(call, scheme.shapes(shapes_of(call), sizes)), like)
        except Exception as problem:  # the user has not asked for these sizes, and has a program for their own
            if not is_refusal(problem):
                warn(FAILED.format(problem))
            self.why_none = f"{sizes}: {problem!r}"
            logger.debug("no program for %s: %r", sizes, problem, exc_info=not is_refusal(problem))
            return None
        return None if guards.values or not assumed.leaves_alike(guards) else (program, guards)

    def _extend(self, known: Known, call: Call, sizes: Sizes) -> bool:
        tried = self._tried(known.family.template, known.guards, call, known.scheme, sizes)
        larger = known.family.extended(tried[0], sizes) if tried is not None else None
        if tried is None or larger is None:
            return False
        self._replace(known, larger, tried[1])
        return True

    @staticmethod
    def _replace(known: Known, larger: Family, guards: Guards) -> None:
        known.family = known.code.family = larger
        known.guards = Guards.joined([known.guards, guards])

    # ------------------------------------------------------------ finding

    def _of(self, kind: Hashable, call: Call) -> Kept | None:
        """What is known of calls like ``call``, unless the model has changed since."""
        return self._held(kind, self._is_apart(kind, call))

    def _held(self, kind: Hashable, has_one_row: bool) -> Kept | None:
        kept = self._kept.get((kind, has_one_row))
        if kept is not None and not kept.guards.hold():
            del self._kept[kind, has_one_row]
            return None
        return kept

    def _is_apart(self, kind: Hashable, call: Call) -> bool:
        """Whether each rank, and microbatch, has a single row, where that makes a difference: dims of 1 are viewed."""
        return kind in self._parted and self._has_one_row(call, shapes_of(call))

    def _has_one_row(self, call: Call, shapes: Shapes) -> bool:
        """Whether a call like ``call``, of tensors of ``shapes``, has one row for each rank and microbatch."""
        dims = input_dims(call.named_tensors, self._plan)
        return self._rows_at_once in [shape[of.batch] for shape, of in zip(shapes, dims) if of.batch is not None]

    def _in(self, known: Known, call: Call) -> Member | None:
        sizes = known.scheme.sizes(shapes_of(call))
        numbers = known.family.numbers(sizes) if sizes is not None else None
        if sizes is None or numbers is None:
            return None
        return Member(known.family.member(sizes, self._facts(call)), known.guards, known.code, numbers)

    def _roles(self, call: Call) -> dict[Place, str]:
        roles: dict[Place, str] = {}
        for tensor, dims in enumerate(input_dims(call.named_tensors, self._plan)):
            if dims.batch is not None:
                roles[tensor, dims.batch] = BATCH
            if dims.sequence is not None:
                roles.setdefault((tensor, dims.sequence), SEQUENCE)
        return roles

    def _units(self, scheme: Scheme) -> dict[str, int]:
        sequence = 2 * self._mesh.size(SEQUENCE_AXIS) if self._mesh.size(SEQUENCE_AXIS) > 1 else 1
        sequence *= self._mesh.size("tp") if self._plan.sequence == "megatron" else 1
        of_role = {BATCH: self._rows_at_once, SEQUENCE: sequence, OTHER: 1}
        return {name: of_role[name[0]] for name in scheme.names.values()}


def _unlike(conditions: Sequence[Condition], sizes: Sizes) -> str:
    """Why a program for ``sizes`` is in no family for which ``conditions`` hold."""
    failed = [condition for condition in conditions if not condition.holds(sizes)]
    told = "; ".join(f"{one}, {one.told}" if one.told else str(one) for one in failed)
    here = ", ".join(f"{name}={size}" for name, size in sizes.items())
    return f"the model asks about sizes ({told}), and {here} is no such batch"
