"""One rank's compiled program at work: ``autograd`` around forward and backward, outputs as the model's.

In a step :class:`Executable` has :class:`BoundProgram` run the forward graph, and the backward graph when autograd
arrives there; it returns what the model would return, and gives each parameter its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autopar.autodiff.autograd import WITNESS, accumulating, applied, below_autograd, keeps_graph, take_saved
from autopar.communication.agreement import SAME_CALLS, agree, digest_of
from autopar.communication.connect import Connection
from autopar.dtensors.dtensor import local_of
from autopar.dtensors.waiting import Stand, fill
from autopar.errors import InvariantError
from autopar.ir.loss import loss_of
from autopar.ir.program import Program
from autopar.ir.signature import restorer
from autopar.ir.tables import InputKind, OutputKind
from autopar.pipeline.microbatches import NewBuffers, Weight, weights
from autopar.runtime.accumulate import Accumulation
from autopar.runtime.batch_counts import BatchCounts
from autopar.runtime.beside_loss import BesideLoss, Watched, check_unwatched
from autopar.runtime.giving import Givers, put
from autopar.runtime.rank_code import RankCode
from autopar.runtime.rank_graphs import BACKWARD, FORWARD, INFERENCE, PARTIAL, REDUCED
from autopar.runtime.rank_program import NOTHING, BoundProgram, Fetch, Step
from autopar.runtime.shared_with_users import SharedWithUsers, check_shared
from autopar.runtime.written_between import WrittenBetween
from autopar.runtime.written_code import code_of_model
from autopar.weights.border import Result, trimmed


class Executable(BoundProgram):
    """A bound program that takes and returns what the model does, with a node in autograd's graph."""

    def __init__(
        self,
        program: Program,
        root: nn.Module,
        connection: Connection,
        accumulation: Accumulation | None = None,
        code: RankCode | None = None,
    ) -> None:
        super().__init__(program, code or code_of_model(program), root, connection)
        self._accumulation = accumulation or Accumulation()
        self._counts = BatchCounts(program, self.slots, connection.comm)
        self._is_weighed, loss = program.is_weighed, program.loss
        self._differentiates_loss_alone = loss is not None and self.role.differentiable == (loss,)
        self._restored = restorer(program)
        self._leaves = [self._leaf(target) for target in self.role.grads]
        self._parameters = [self.slots[target] for target in self.role.grads if target in self.slots]
        places = {entry.target: self.slots[entry.target] for _, entry in program.takes(InputKind.PARAMETER)}
        self.kept = WrittenBetween(places, self.resident, self.behind)
        self._gives = [self.giver(target) for target in self.role.grads]
        self._givers: Givers | None = None  # made by the first backward pass, which shows what gradients look like
        self._results = {
            position: Result(entry.target, types[0], connection)
            for position, (entry, types) in enumerate(zip(program.outputs, program.returned_types))
            if entry.kind is OutputKind.USER
        }
        self._outputs = [(position, result.give) for position, result in self._results.items()]
        given = [f"output '{each.name}'" for each in self._results.values()]
        is_whole = [each.is_given_as_it_is for each in self._results.values()]
        self._with_users = SharedWithUsers(
            [f"input '{name}'" for name in self.users] + given, [True] * len(self.users) + is_whole
        )
        others = [(at, each) for at, each in self._results.items() if at not in self.role.differentiable]
        beside = [(at, each.name, each.give) for at, each in others if each.value.requires_grad]
        self._beside = BesideLoss(beside, connection.comm.agreement.everyone)

    # ------------------------------------------------------------ running

    def counts(self, tensors: Sequence[Tensor], share: float) -> list[Tensor]:
        """What these ``tensors``, as a ``share`` of a batch, add to the sums over it; see :class:`BatchCounts`."""
        return self._counts.of(tensors, share)

    def loss(self, tensors: Sequence[Tensor], seed: int, weight: Weight | None = None) -> Tensor:
        """The loss for the user's ``tensors``, to go backward from; other outputs are not made.

        Raises InvariantError for a model without a loss.
        """
        if not self._differentiates_loss_alone:
            return loss_of(self.run(tensors, seed, weight))
        wholes = self._wholes(tensors, weight) if self._is_weighed else NOTHING
        found = self._applied(Step(tensors, seed, learns=True, wholes=wholes, buffers=_buffers(weight)))
        loss: Tensor = found[0]
        return loss

    def run(self, tensors: Sequence[Tensor], seed: int, weight: Weight | None = None) -> Any:
        """The model's output for the user's ``tensors``; with a gradient where gradients are enabled.

        ``weight``: what they count for as a part of a batch; unless given, they are the batch.
        """
        wholes = self._wholes(tensors, weight) if self._is_weighed else NOTHING
        step = Step(tensors, seed, wholes=wholes, buffers=_buffers(weight))
        if not torch.is_grad_enabled():
            self.call(INFERENCE, step)
        elif self.role.backward is not None:
            applied_to = self._applied(step)
            found = dict(zip((*self.role.differentiable, *self._beside.places), applied_to))
            given = [found[at] if at in found else give(step.returned[at]) for at, give in self._outputs]
            if self._with_users.positions:
                node: Any = applied_to[0].grad_fn
                node.shared = self._with_users.after([*tensors, *given])
            return self._restored(given)
        else:
            with torch.no_grad():
                self.call(INFERENCE, step)
        returned = step.returned
        return self._restored([give(returned[position]) for position, give in self._outputs])

    def _applied(self, step: Step) -> Sequence[Tensor]:
        """The differentiable outputs and those beside the loss, after a forward pass that autograd knows of."""
        if len(self._parameters) == len(self._leaves):
            leaves: list[Any] = [table[key] for table, key in self._parameters]
        else:
            leaves = [leaf(step) for leaf in self._leaves]
        watched: Watched = []
        found: Sequence[Tensor] = applied(_Differentiable, self, step, watched, WITNESS, *leaves)
        watched += self._beside.watched(found[len(self.role.differentiable) :])
        return found

    def _wholes(self, tensors: Sequence[Tensor], weight: Weight | None) -> Mapping[str, Tensor]:
        return (weight or weights(self.program, [self.counts(tensors, 1.0)], [1])[0]).wholes

    def forward(self, step: Step) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(differentiable outputs, then those beside the loss; values saved for backward)."""
        saved = self.call(self.graphs.learning if step.learns else FORWARD, step)
        outputs, returned = [], list(step.returned)
        if not self._with_users.is_known and not step.learns:
            self._with_users.learn([*step.tensors, *[returned[at] for at in self._results]], saved)
        for position in self.role.differentiable:
            # a tensor of its own: autograd writes into what it returns, and this may be a parameter or saved
            outputs.append(self._results[position].give(returned[position]).detach())
            returned[position] = None
        if not step.learns:
            outputs += self._beside.of(returned)
        step.returned = returned
        return tuple(outputs), saved

    def backward(
        self, saved: list[Any], tangents: Sequence[Tensor | None], accumulate: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of the leaves; None for a parameter whose gradient could be put, or added, to its ``.grad``.

        ``tangents``: of all that :meth:`forward` gave. ``accumulate`` says for which leaves that is allowed. ``saved``
        is emptied, so that each value is freed at its last use.
        """
        self.comm.phase = "backward"
        for position, tangent in zip(self.role.differentiable, tangents):
            saved.append(self._results[position].take(tangent))
        with below_autograd():
            found = self._accumulation.backward(self, saved, accumulate)
        if found is None:
            return [None] * len(self._leaves)
        self.comm.updates += 1
        if self._givers is None:
            self._givers = Givers(self._gives, found)
        return self._givers(found, accumulate)

    def check_beside(self, tangents: Sequence[Tensor | None]) -> None:
        """Raise InvariantError where a backward pass comes from outputs beside the loss; what is saved stays."""
        self._beside.check(tangents[len(self.role.differentiable) :])

    @property
    def parameters(self) -> list[Tensor]:
        return [table[key] for table, key in self._parameters]

    @property
    def defers(self) -> bool:
        return PARTIAL in self.graphs.rare

    def whole(self, saved: list[Any]) -> list[Tensor]:
        return self.own(BACKWARD, saved)

    def partial(self, saved: list[Any]) -> list[Tensor]:
        return self.own(PARTIAL, saved)

    def reduced(self, partial: list[Tensor]) -> list[Tensor]:
        return self.own(REDUCED, partial)

    def give(self, grads: Sequence[Tensor], past_hooks: bool, waiting: Sequence[Stand] | None) -> None:
        self.comm.updates += 1
        if waiting is not None:
            for parameter, stand, grad in zip(self.parameters, waiting, grads):
                fill(stand, trimmed(grad, local_of(parameter).shape))
            return
        for target, give, grad in zip(self.role.grads, self._gives, grads):
            if target in self.slots:
                table, key = self.slots[target]
                put(give, table[key], grad, past_hooks=past_hooks)

    def agree(self, what: str) -> None:
        agreement, self.comm.phase = self.comm.agreement, "backward"
        agreement.start(digest_of(what), lambda: what, f"what reads .grad does so on every rank. {SAME_CALLS}")
        agreement.settle()

    # ------------------------------------------------------------ binding

    def _leaf(self, target: str) -> Fetch:
        """A function that finds the user's tensor for gradient ``target``: a parameter or an input."""
        if target in self.slots:
            table, key = self.slots[target]
            return lambda step: table[key]  # type: ignore[no-any-return]
        position = self.users.index(target)
        return lambda step: step.tensors[position]


def _buffers(weight: Weight | None) -> NewBuffers | None:
    return None if weight is None else weight.buffers


class _Differentiable(torch.autograd.Function):
    """The node of a rank program in autograd's graph. Leaves: the parameters and inputs that get gradients."""

    @staticmethod
    def forward(
        ctx: Any, executable: Executable, step: Step, watched: Watched, witness: Tensor, *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, saved = executable.forward(step)
        ctx.executable, ctx.watched, ctx.versions = executable, watched, executable.kept.after(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise InvariantError("create_graph=True asks for second derivatives, which a rank program does not have")
        check_unwatched(ctx.watched)
        ctx.executable.check_beside(tangents)
        check, agreement = partial(ctx.executable.kept.check, ctx.versions), ctx.executable.comm.agreement
        agree(agreement, check) if agreement.noted and ctx.executable.graphs.gathered else check()
        shared = getattr(ctx, "shared", None)
        if shared is not None:
            check_shared(shared, lambda: ctx.saved_tensors)
            if not keeps_graph():
                del ctx.shared
        wanted = accumulating(ctx, 3)[1:]
        return (None, None, None, None, *ctx.executable.backward(take_saved(ctx), tangents, wanted))
