"""The most bytes that a rank holds in a step of a program without a pipeline, without what stays for all of it.

What is counted is what :mod:`autopar.simulator.lockstep` counts of real tensors: distinct storages of the values that
are alive between two lines. What a kernel needs within a line is not, and the emitted code, which writes into values
that die, may need less. The table of :mod:`autopar.memory.table` has what the bytes are for, of pipelines too.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir.program import Program
from autopar.ir.tables import InputKind
from autopar.memory.account import WORKING, Account
from autopar.memory.step import forward_of, placed
from autopar.memory.tape import Tapes


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank. ``resident``: parameters, buffers, constants and inputs, which stay for the whole step. Beyond
    these: what is ``kept`` after forward, outputs included, and the most in ``forward`` and in ``backward``."""

    resident: int
    kept: int
    forward: int
    backward: int

    @property
    def activations(self) -> int:
        return max(self.forward, self.backward)

    @property
    def total(self) -> int:
        return self.resident + self.activations


def peak(program: Program) -> Peak:
    """Of a step of a differentiated program, with parameters that are gathered in it (also with ``Plan(zero=1)``)."""
    role, mesh = program.required_role, program.mesh
    account, tapes = Account(), Tapes(mesh, mesh.coordinates(mesh.world_size - 1))
    inputs = [placed(account, program, node, entry) for node, entry in program.placeholders(*InputKind)]
    account.hold(one.storage for one in inputs)
    resident = account.total
    given = forward_of(program, role.forward, tapes, account, inputs)
    forward, kept = account.most - resident, sum(account.marks[-1][1]) - resident
    if role.backward is None:
        return Peak(resident, kept, forward, 0)
    account.most = account.total
    tapes.run(role.backward, account, given, WORKING, 0)
    return Peak(resident, kept, forward, account.most - resident)
