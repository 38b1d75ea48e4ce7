"""The parallel module: a drop-in ``nn.Module`` around an unmodified model, one program per kind of call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.cache.compiled import cached_program, prove_derived
from autopar.cache.kept_families import fitted
from autopar.cache.key import Request
from autopar.calls.calls import Call, Signature, gathered
from autopar.calls.program_cache import ProgramCache
from autopar.calls.variants import check_whole_batches
from autopar.communication.connect import Connection, not_launched
from autopar.dtensors.dtensor import full_of
from autopar.errors import InvariantError
from autopar.families.family import Family
from autopar.frontend.torch_layers import packs_padding
from autopar.holding import Holding, asked_by, facts_of, given_programs
from autopar.ir.guards import Guards
from autopar.ir.layout import Layout
from autopar.ir.load import ExpertLoad
from autopar.ir.loss import loss_of
from autopar.ir.program import AnyProgram
from autopar.ir.traffic import Transfer
from autopar.mesh import PIPELINE, Mesh
from autopar.other_methods import asked, for_frameworks, is_refused, refusal
from autopar.pipeline import microbatches
from autopar.pipeline.microbatches import Weight
from autopar.pipeline.stages import first_ranks
from autopar.plan import Plan
from autopar.runtime.accumulate import Accumulation
from autopar.runtime.execute_pipeline import PipelineExecutable
from autopar.runtime.written_code import written
from autopar.schedules.timing import Timeline
from autopar.weights.changed_parts import watch_parts
from autopar.weights.clipping import clip_gradients
from autopar.weights.expert_loads import gathered_loads
from autopar.weights.parameters import Weights
from autopar.weights.stacks import rows_in_place
from autopar.weights.state_dicts import loaded, warning_state_dict
from autopar.weights.torch_state_dicts import let_torch_have_all_stages
from autopar.weights.whole_tensors import full_grads, full_state_dict

if TYPE_CHECKING:  # imported at use, as most launches use none of them
    from autopar.simulator.parts import Step

SEED_STRIDE = 1_000_003  # seeds of runs with neighbouring plan.seed do not overlap for that many steps


class ParallelModule(nn.Module):
    """The result of ``autopar.parallelize``. Its submodules are the model's own, so all names are the model's too.

    Under torch.distributed the parameters are DTensors, each rank holding its part, and calling the module runs this
    rank's program. Without (``connection`` is None) there are :attr:`program` and :meth:`simulate`.
    """

    mesh: Mesh
    plan: Plan
    _held: Holding
    _connection: Connection | None
    _programs: ProgramCache
    _signature: Signature
    _accumulation: Accumulation
    _is_pipelined: bool

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        plan: Plan,
        connection: Connection | None,
        programs: Sequence[AnyProgram | Family] = (),
        where: str = "",
        held: Holding | None = None,
    ) -> None:
        super().__init__()
        tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
        hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
        self.__dict__.update({shared: model.__dict__[shared] for shared in tables + hooks})
        self.training = model.training
        held = held or Holding(model, Weights(self, connection, plan.initial))
        accumulation = Accumulation()

        def compiled(
            call: Call, layouts: Mapping[str, Layout] | None, like: AnyProgram | None, unasked: bool
        ) -> tuple[AnyProgram, Guards]:
            chosen, homes = replace(plan, check_numerics=plan.check_numerics and not unasked), held.weights.homes
            request = Request(model, mesh, chosen, call.args, call.kwargs, layouts, homes, like)
            found, guards = cached_program(request, written)
            check_whole_batches(guards, found, model)
            return found, guards

        facts, asked = partial(facts_of, held), partial(asked_by, held, mesh, plan)
        given = given_programs(held, programs, where) if programs else None
        prove = partial(prove_derived, model) if plan.verify else None
        cache = ProgramCache(
            compiled, mesh, plan, held.weights, accumulation, facts, asked, fitted, packs_padding(model), given, prove
        )
        # past nn.Module, which would take offence at a submodule or buffer of the model's that is called "plan", and
        # would put the model itself as a submodule, with a prefix before all names
        self.__dict__.update(mesh=mesh, plan=plan, _held=held, _connection=connection, _programs=cache)
        self.__dict__.update(_signature=Signature(model.forward), _accumulation=accumulation)
        self.__dict__.update(_is_pipelined=mesh.is_pipelined)  # asked in each call
        self.__dict__.update(for_frameworks(self, plan))
        let_torch_have_all_stages(self._is_pipelined)
        watch_parts(self, held.weights, self._is_pipelined, cache.clear)

    # ------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; with ``Plan(inputs="local")`` the tensors are this rank's part of the batch."""
        if self._connection is None:
            raise not_launched(self.mesh)
        again = self._programs.again(args, kwargs, self.training)
        if again is not None:
            return again[0].run(again[1], self._seed())
        call = self._signature.call(args, kwargs)
        if call.is_split:
            call = gathered(call, self.plan)
        if self._is_pipelined:
            return self._pipelined(call, trains=False)
        return self._programs.run(call, self.training, self._seed(), args, kwargs)

    def _seed(self) -> int:
        """Of the dropout masks: another one in each call that learns."""
        if self.training and torch.is_grad_enabled():
            self._held.calls += 1
        return self.plan.seed * SEED_STRIDE + self._held.calls

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch; gradients are added to ``.grad``. Returns the (detached) loss.

        With ``Plan(microbatches=m)`` the batch (then passed by name) runs in m parts, one after the other; loss and
        gradients are those of the whole, and the data axes communicate once.
        """
        if self._is_pipelined:
            loss: Tensor = self._pipelined(self._signature.call(args, kwargs), trains=True)
            return loss
        if self.plan.microbatches > 1:
            return self._train_in_parts(self._signature.call(args, kwargs))
        loss = self._loss(args, kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _loss(self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight | None = None) -> Tensor:
        """The loss alone: the program makes no other outputs, unless a hook of the user's is to see them."""
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        if any(hooks) or not torch.is_grad_enabled() or self._connection is None:
            with self._programs.weighing(weight):
                return loss_of(self(*args, **kwargs))
        call = self._signature.call(args, kwargs)
        return self._programs.loss(call, self.training, self._seed(), weight)

    def _pipelined(self, call: Call, trains: bool) -> Any:
        """A step of the pipeline: the loss, or the model's output."""
        if self._connection is None:
            raise not_launched(self.mesh)
        batches = self._microbatches(call)
        executable = self._programs.bound(call, self.training)
        assert isinstance(executable, PipelineExecutable)
        tensors = [self._signature.call((), batch).tensors for batch in batches]
        rows = microbatches.rows(call.kwargs, batches, self.plan)
        learns = trains or (self.training and torch.is_grad_enabled())
        seed = self.plan.seed * SEED_STRIDE + self._held.calls + learns
        self._held.calls += len(batches) * learns
        return executable.train(tensors, rows, seed) if trains else executable.run(tensors, rows, seed)

    def _train_in_parts(self, call: Call) -> Tensor:
        batches, losses = self._microbatches(call), list[Tensor]()
        weights = self._weights(call, batches)
        with self._accumulation.one_batch():
            for place, (batch, weight) in enumerate(zip(batches, weights)):
                loss = self._loss((), dict(batch), weight) * weight.loss
                self._accumulation.backward_of_part(loss, place == len(batches) - 1, self.parameters())
                losses.append(loss.detach())
        if weights[0].buffers is not None:
            weights[0].buffers.write()
        return sum(losses[1:], losses[0])

    def _microbatches(self, call: Call) -> list[dict[str, Any]]:
        return microbatches.parts(call.args, call.kwargs, self.mesh, self.plan, local=self.plan.inputs == "local")

    def _weights(self, whole: Call, batches: list[dict[str, Any]]) -> list[Weight]:
        if self._connection is None:
            raise not_launched(self.mesh)
        calls = [self._signature.call((), batch) for batch in batches]
        rows = microbatches.rows(whole.kwargs, batches, self.plan)
        parts = zip(calls, microbatches.shares(rows))
        counted = [self._programs.executable(call, self.training).counts(call.tensors, share) for call, share in parts]
        return microbatches.weights(self._programs.executable(calls[0], self.training).program, counted, rows)

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside this context, gradients are added up without communication over the data axes.

        The next backward outside reduces the sum into ``.grad``; with ``Plan(zero=2)`` and ``3`` each does, in parts,
        and with hooks on gradients too. What computes with a ``.grad`` before that (a step, a norm) has the sum reduced
        first, so it does so on every rank. ``zero_grad()`` and ``.grad = None`` drop what waits.
        """
        return self._accumulation.no_sync()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_`` of all parameters, with one small all-reduce for each axis; collective.

        Returns the norm that all gradients had before, as one vector; the same on every rank.
        """
        if self._connection is None:
            raise not_launched(self.mesh)
        self._accumulation.complete()
        self._connection.comm.phase = "clipping"
        first, here = self._first_users(), self._connection.comm.coordinates.get(PIPELINE)
        pairs = [(name, parameter.grad) for name, parameter in self.named_parameters()]
        grads = [(grad, first.get(name, here) == here) for name, grad in pairs if grad is not None]
        return clip_gradients(grads, max_norm, norm_type, self._connection.comm, error_if_nonfinite)

    def simulate(self, *args: Any, **kwargs: Any) -> Step:
        """One step of all ranks in this process: output, loss, whole gradients, traffic. Takes whole batches."""
        from autopar.simulate import simulate

        call = self._signature.call(args, kwargs)
        program = self._programs.of_whole(call, self.training)
        with torch.no_grad():  # a state dict would lack buffers that are not persistent
            held: dict[str, Tensor] = dict(self.named_buffers(remove_duplicate=False))
            held.update(self.named_parameters(remove_duplicate=False))
            tensors = {name: full_of(tensor) for name, tensor in held.items()}
        seed = self.plan.seed * SEED_STRIDE
        return simulate(program, tensors, call.args, call.kwargs, backward=torch.is_grad_enabled(), seed=seed)

    # ------------------------------------------------------------ looking

    @property
    def program(self) -> AnyProgram:
        """The program of the latest kind of call. Raises InvariantError before there is one."""
        latest = self._programs.latest
        if latest is None:
            raise InvariantError(
                "there is no program yet: it is made at the first call\n"
                "Way out: autopar.parallelize(model, mesh, example_inputs=batch), or call the model once."
            )
        return latest

    @property
    def families(self) -> tuple[Family, ...]:
        """The programs that serve batches of several lengths so far, with expressions for sizes (docs/lengths.md)."""
        return self._programs.families.families

    @property
    def traffic(self) -> tuple[Transfer, ...]:
        """The transfers of this rank so far, by phase, axis and collective."""
        return self._connection.comm.traffic if self._connection else ()

    def expert_load(self) -> dict[str, ExpertLoad]:
        """The rows of the experts of each layer since the last call, on every rank; collective.

        By the layer's module. Raises InvariantError without ``Plan(record_load=True)`` or a ``capacity_factor``.
        """
        if not self.plan.counts_load:
            raise InvariantError("the load of experts is not counted\nWay out: Plan(record_load=True)")
        if self._connection is None:
            raise not_launched(self.mesh)
        return gathered_loads(self._connection.comm, list(self.program.graphs.values()))

    def timeline(self) -> Timeline:
        """The computes of each pipeline rank in the latest step, on every rank; collective.

        Draw it with :func:`autopar.schedules.draw.draw` or :func:`autopar.schedules.svg.svg`. Raises InvariantError
        where no step of a pipeline has run.
        """
        executable = self._programs.latest_bound
        if not isinstance(executable, PipelineExecutable):
            raise InvariantError("there is no timeline: the latest program has not run, or is not on a mesh with pp")
        return executable.timeline()

    def trace(self, directory: str | Path) -> AbstractContextManager[None]:
        """Record what this rank does inside, and write it to ``directory/rank0.json`` (by its number) at the end.

        In the trace event format, for Perfetto and Holistic Trace Analysis: the collectives of the program by the names
        of their nodes, with their groups and bytes, messages, and computations.
        """
        if self._connection is None:
            raise not_launched(self.mesh)
        from autopar.traces.recorded import recorded

        return recorded(self._connection.comm, directory)

    def _repr_html_(self) -> str:
        """For notebooks."""
        from autopar.analysis.notebook import module_html

        return module_html(type(self._held.model).__name__, str(self.mesh), self._programs.latest)

    def prepare(self, *args: Any, **kwargs: Any) -> AnyProgram:
        """Make the program of this call without running it; the tensors may be meta tensors."""
        return self._programs.prepared(self._signature.call(args, kwargs), self.training)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; of parameters, DTensors of this rank's parts. ``torch.save`` of it warns that it is not all."""
        return warning_state_dict(super().state_dict(*args, **kwargs))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; on a pipeline collective."""
        return loaded(self._connection, partial(super().load_state_dict, *args, **kwargs))

    def full_state_dict(self, *, device: str = "cpu", rank0_only: bool = False) -> dict[str, Tensor]:
        """Copies of the whole tensors under the model's names, on every rank or only on rank 0 (empty elsewhere).

        Collective; one tensor after the other is gathered.
        """
        return full_state_dict(self._held.weights, self.state_dict(), device, 0 if rank0_only else None)

    def full_grads(self) -> dict[str, Tensor]:
        """The whole gradients by parameter name, those that there are; collective."""
        self._accumulation.complete()
        grads = {name: parameter.grad for name, parameter in self.named_parameters() if parameter.grad is not None}
        return full_grads(self._held.weights, grads, self._first_users())

    def _first_users(self) -> dict[str, int]:
        """On a pipeline: parameter name -> the first pipeline rank that uses it in the latest program.

        That rank has its gradient. Empty without a pipeline.
        """
        program = self._programs.latest
        return first_ranks(program) if program is not None and self._connection is not None else {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_held" not in self.__dict__ or (name.startswith("_") and name not in vars(self._held.model)):
                raise
        model = self._held.model
        found = asked(model, name)
        if is_refused(model, name, found, self._is_pipelined):
            raise AttributeError(refusal(type(model).__name__, name))
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        """What a user sets here is set on the model, which reads it; modules and tensors are in shared tables."""
        if "_held" not in self.__dict__ or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._held.model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._held.model, name)

    # ------------------------------------------------------------ staying the model

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelModule:
        """A model of its own, with copies of this rank's parts, on the same ranks (``AveragedModel``)."""
        before, made = self._held, ParallelModule.__new__(ParallelModule)
        memo |= before.weights.shared_with_copies() | {id(self): made}  # which hooks on state dicts may hold
        # torch copies no DTensor of which the part here lies within other memory, as that of a gradient in a bucket
        grads = [parameter.grad for parameter in self.parameters() if isinstance(parameter.grad, DTensor)]
        memo |= {id(grad): grad.clone() for grad in grads}
        model = copy.deepcopy(before.model, memo)
        held = Holding(model, before.weights.copied(before.model, model), before.calls)
        ParallelModule.__init__(made, model, self.mesh, self.plan, self._connection, held=held)
        made._held.weights.root = made
        made._programs.learn(self._programs)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InvariantError(
            "a parallel module cannot be pickled: its parameters are parts that belong to the ranks of this run\n"
            "Way out: torch.save(model.full_state_dict(), path), which all ranks call; or autopar.Checkpoints."
        )

    def train(self, mode: bool = True) -> ParallelModule:
        super().train(mode)
        self._held.model.training = mode
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> ParallelModule:
        with rows_in_place(self._held.weights.stacks):
            return super().apply(fn)


def held_by(model: nn.Module) -> Holding:
    """The public face of a model, parallel or not, for checkpoints and other files above.

    It is a function and no attribute: a parallel module has the names of the user's model, so any attribute might be
    one of its submodules. For an ordinary module the answer is computed anew each time: all is held whole, no calls are
    counted.
    """
    return model._held if isinstance(model, ParallelModule) else Holding(model, Weights(model))
