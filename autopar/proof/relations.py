"""Which values are the same on which ranks, in every graph of a program: the loss must be, and each gradient must
differ from rank to rank only as its parameter does.

A gradient that was never reduced differs over ``dp``; a sum over ranks that hold the same counts it several times. Both
are seen on the graphs alone, whatever the sizes of mesh and model. What is not seen here, a wrong number that is the
same on all ranks, is left to the layers that compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from autopar.ir import collectives as comm
from autopar.ir.node import Node, origin, value, values
from autopar.ir.program import AnyProgram, PipelinedProgram, Program
from autopar.ir.tables import InputKind, OutputKind
from autopar.pipeline.stages import name_of, peer_of
from autopar.proof.refusal import Layer, Refusal
from autopar.proof.varying import AbstractRun, Atoms, Over, Varying, groups_of, results_of

HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT, InputKind.INPUT)
Crossing = tuple[int, int, str]  # stage that makes a value, the one that takes it, its name


@dataclass
class Relations:
    """What the abstract run of a program has found."""

    program: AnyProgram
    refusals: list[Refusal] = field(default_factory=list)
    facts: dict[str, int] = field(default_factory=dict)
    sent: dict[Crossing, Varying] = field(default_factory=dict)
    returned: dict[Crossing, Varying] = field(default_factory=dict)  # gradients that come back
    suspects: list[Refusal] = field(default_factory=list)  # wrong only where a result is: see _check_claims

    def note(self, fact: str, count: int = 1) -> None:
        self.facts[fact] = self.facts.get(fact, 0) + count


def relations(program: AnyProgram) -> Relations:
    """The values of ``program`` related to the ranks that hold them."""
    found = Relations(program)
    stages = program.stages if isinstance(program, PipelinedProgram) else (program,)
    atoms = Atoms(stages[0].mesh, groups_of(graph for stage in stages for graph in stage.graphs.values()))
    saved = [_forward(found, stage, number, atoms) for number, stage in enumerate(stages)]
    for number, stage in reversed(list(enumerate(stages))):
        _backward(found, stage, number, atoms, saved[number])
    if isinstance(program, PipelinedProgram) and program.tail is not None:
        rest = relations(program.tail)
        found.refusals += rest.refusals
    found.refusals[:0] = found.suspects[:1] if found.refusals else []
    return found


def _forward(found: Relations, stage: Program, number: int, atoms: Atoms) -> list[Varying]:
    """Run the graphs of the forward passes; gives what is known of the saved values."""
    graphs = stage.graphs
    saved: list[Varying] = []
    for name in ("", "forward", "inference"):
        if name not in graphs:
            continue
        run = AbstractRun(atoms)
        given = [_held(found, stage, number, node, atoms) for node, _ in stage.placeholders(*InputKind)]
        results = run.run(graphs[name], given)
        where = name or "the split graph"
        _refuse_counted(found, run, where)
        if not name:
            _check_claims(found, stage, run)
        for out, node, varying in zip(stage.outputs, stage.returned, results):
            if out.kind is OutputKind.SENT:
                found.sent[number, peer_of(out), name_of(out)] = varying
            else:
                _check_result(found, f"{where}: {_output_words(out.target)}", node, varying.over, atoms)
        if name == "forward":
            saved = results[len(stage.outputs) :]
    return saved


def _held(found: Relations, stage: Program, number: int, node: Node, atoms: Atoms) -> Varying:
    entry = stage.input_of(node)
    if entry.kind in HELD:
        return Varying(atoms.of_layout(value(node).layout))
    if entry.kind is InputKind.RECEIVED:
        return found.sent.get((peer_of(entry), number, name_of(entry)), Varying())
    return Varying()  # seed, sums over the whole batch


def _output_words(target: str) -> str:
    return f"output '{target}'" if target else "the output"


def _backward(found: Relations, stage: Program, number: int, atoms: Atoms, saved: Sequence[Varying]) -> None:
    role = stage.role
    if role is None or role.backward is None:
        return
    given = list(saved)
    for position in role.differentiable:
        out = stage.outputs[position]
        sent = out.kind is OutputKind.SENT
        given.append(found.returned.get((number, peer_of(out), name_of(out)), Varying()) if sent else Varying())
    run = AbstractRun(atoms)
    results = run.run(role.backward, given)
    _refuse_counted(found, run, "backward")
    table = {entry.target: (node, entry) for node, entry in stage.placeholders(*InputKind)}
    for target, varying in zip(role.grads, results):
        node, entry = table[target]
        if entry.kind is InputKind.RECEIVED:
            found.returned[peer_of(entry), number, name_of(entry)] = varying
            continue
        allowed = atoms.of_layout(value(node).layout)
        if extra := varying.over - allowed:
            words = atoms.words(extra)
            problem = f"it differs from rank to rank over {words}, where the ranks hold the same '{target}'"
            cause = f"a reduction over {words} is missing: before it is returned, or of a value that it is made from"
            result = results_of(role.backward)[role.grads.index(target)]
            _refuse(found, f"backward: the gradient of '{target}', {_named(result)}", problem, cause, extra)
        else:
            found.note("gradients that differ only where their parameter does")


# ---------------------------------------------------------------- what is refused


def _check_claims(found: Relations, stage: Program, run: AbstractRun) -> None:
    """Each floating-point value of the split graph differs at most over the axes of its layout.

    Whole numbers may be the positions of a rank, which layouts do not speak of. What is computed from them may be meant
    to be other on each rank (of a running sum, what the ranks before have): it is named where a result is wrong.
    """
    for node, varying in run.known.items():
        for kind in [kind for kind in values(node)[:1] if kind.dtype.is_floating_point]:
            if extra := varying.over - run.atoms.of_layout(kind.layout):
                words = run.atoms.words(extra)
                problem = f"its layout {kind.layout} says that ranks along {words} hold the same, and they do not"
                cause = f"a collective over {words} is missing, or a rule gives the result a wrong layout"
                where = f"the split graph: {_named(node)}"
                if extra <= varying.placed:
                    found.suspects.append(_refusal(found, where, problem, cause, extra))
                    continue
                _refuse(found, where, problem, cause, extra)
                return  # what follows from it differs too
    found.note("values that differ only where their layout says so", len(run.known))


def _check_result(found: Relations, where: str, node: Node, over: Over, atoms: Atoms) -> None:
    kind = value(node)
    if extra := over - atoms.of_layout(kind.layout):
        words = atoms.words(extra)
        what = "the loss of the whole batch is one number" if not kind.shape else f"its layout is {kind.layout}"
        problem = f"it differs from rank to rank over {words}; {what}"
        _refuse(found, f"{where}, {_named(node)}", problem, f"an all-reduce over {words} is missing", extra)
    else:
        found.note("results that are the same on all ranks" if not over else "results that differ as their layout says")


def _refuse_counted(found: Relations, run: AbstractRun, where: str) -> None:
    for node, over in run.counted:
        words = run.atoms.words(over)
        ways = run.atoms.mesh.size(str(comm.arguments_of(node)["axis"]))
        problem = f"a sum over {words} of what its ranks hold alike: it counts it again for each of {ways} ranks"
        cause = "a reduction is done twice, or over the wrong axis"
        _refuse(found, f"{where}: {_named(node)}", problem, cause, over)


def _refusal(found: Relations, where: str, problem: str, cause: str, over: Over) -> Refusal:
    axis, stride, _ = min(over)
    return Refusal(Layer.RELATIONS, where, problem, cause, (0, found.program.mesh.rank({axis: stride})))


def _refuse(found: Relations, where: str, problem: str, cause: str, over: Over) -> None:
    refusal = _refusal(found, where, problem, cause, over)
    if refusal not in found.refusals:
        found.refusals.append(refusal)


def _named(node: Node) -> str:
    """``all_reduce_3 (model.layers.0.mlp)``."""
    module = origin(node).module
    return f"{node.name} ({module})" if module else node.name
