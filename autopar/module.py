"""The parallel module: a drop-in ``nn.Module`` around an unmodified model, one program per kind of call."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.compiler import compile_program
from autopar.errors import InvariantError
from autopar.frontend.torch_layers import packs_padding
from autopar.ir.loss import loss_of
from autopar.ir.node import value
from autopar.ir.program import AnyProgram, PipelinedProgram, weight_layouts
from autopar.ir.tables import InputKind
from autopar.ir.traffic import Transfer
from autopar.mesh import PIPELINE, Mesh
from autopar.pipeline import microbatches
from autopar.pipeline.stages import first_ranks, held_elsewhere
from autopar.plan import Plan
from autopar.runtime.accumulate import Accumulation
from autopar.runtime.calls import Call, Signature, global_call, shapes
from autopar.runtime.clipping import clip_gradients
from autopar.runtime.connect import Connection, not_launched
from autopar.runtime.execute import Executable
from autopar.runtime.execute_pipeline import PipelineExecutable
from autopar.runtime.parameters import Weights, tables, traceable
from autopar.schedules.timing import Timeline
from autopar.simulate import simulate
from autopar.simulator.parts import Step

PROGRAMS_KEPT = 8
SEED_STRIDE = 1_000_003  # seeds of runs with neighbouring plan.seed do not overlap for that many steps

logger = logging.getLogger("autopar")


class ParallelModule(nn.Module):
    """What ``autopar.parallelize`` returns. Its submodules are the model's own, so all names are the model's too.

    Under torch.distributed the parameters are DTensors, each rank holding its part, and calling the module runs this
    rank's program. Without (``connection`` is None) there are :attr:`program` and :meth:`simulate`.
    """

    mesh: Mesh
    plan: Plan

    def __init__(self, model: nn.Module, mesh: Mesh, plan: Plan, connection: Connection | None) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not as a submodule: that would put a prefix before all names
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        for hooks in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
            self.__dict__[hooks] = model.__dict__[hooks]
        self.training = model.training
        # past nn.Module, which would take offence at a submodule of the model's that is called "plan"
        object.__setattr__(self, "mesh", mesh)
        object.__setattr__(self, "plan", plan)
        self._connection = connection
        self._signature = Signature(model.forward)
        self._programs: OrderedDict[Hashable, AnyProgram] = OrderedDict()  # the latest used last
        self._executables: dict[Hashable, Executable | PipelineExecutable] = {}
        self._packs_padding = packs_padding(model)
        self._steps = 0
        self._accumulation = Accumulation()
        self._weights = Weights(self, connection.of_stage()) if connection else None
        self._slots = [(table, key) for module, table, key, _ in tables(self) if table is module._parameters]

    # ------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; with ``Plan(inputs="local")`` the tensors are this rank's part of the batch."""
        if self._connection is None:
            raise not_launched(self.mesh)
        call = self._signature.call(args, kwargs)
        if self.mesh.is_pipelined:
            return self._pipelined(call, trains=False)
        executable = self._executable(call)
        if self.training and torch.is_grad_enabled():
            self._steps += 1
        return executable.run(call.tensors, self.plan.seed * SEED_STRIDE + self._steps)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch; gradients are added to ``.grad``. Returns the (detached) loss.

        With ``Plan(microbatches=m)`` the batch (then passed by name) runs in m parts, one after the other; loss and
        gradients are those of the whole, and the data axes communicate once.
        """
        if self.mesh.is_pipelined:
            loss: Tensor = self._pipelined(self._signature.call(args, kwargs), trains=True)
            return loss
        if self.plan.microbatches > 1:
            return self._train_in_parts(self._signature.call(args, kwargs))
        loss = loss_of(self(*args, **kwargs))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _pipelined(self, call: Call, trains: bool) -> Any:
        """A step of the pipeline: the loss, or what the model returns."""
        if self._connection is None:
            raise not_launched(self.mesh)
        batches = microbatches.parts(call.args, call.kwargs, self.mesh, self.plan)
        executable = self._made(call)
        assert isinstance(executable, PipelineExecutable)
        tensors = [self._signature.call((), batch).tensors for batch in batches]
        rows = microbatches.rows(call.kwargs, batches, self.plan)
        learns = trains or (self.training and torch.is_grad_enabled())
        seed = self.plan.seed * SEED_STRIDE + self._steps + learns
        self._steps += len(batches) * learns
        return executable.train(tensors, rows, seed) if trains else executable.run(tensors, rows, seed)

    def _train_in_parts(self, call: Call) -> Tensor:
        batches = microbatches.parts(call.args, call.kwargs, self.mesh, self.plan)
        shares = self._shares(call, batches)
        total: Tensor | None = None
        for place, (batch, share) in enumerate(zip(batches, shares)):
            last = place == len(batches) - 1
            with nullcontext() if last else self.no_sync():
                loss = loss_of(self(**batch)) * share
                loss.backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _shares(self, whole: Call, batches: list[dict[str, Any]]) -> list[Tensor | float]:
        if self._connection is None:
            raise not_launched(self.mesh)
        counts = []
        for batch in batches:
            call = self._signature.call((), batch)
            counts.append(self._executable(call).count(call.tensors))
        return microbatches.shares(counts, microbatches.rows(whole.kwargs, batches, self.plan))

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, gradients are added up without communication over the data axes; the next backward pass outside
        reduces the sum and puts it into ``.grad``. With ``Plan(zero=2)`` and ``3`` they are reduced each time, and
        added up in their sharded form, since whole ones have no room."""
        return self._accumulation.no_sync()

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """As ``torch.nn.utils.clip_grad_norm_`` of all parameters, with one small all-reduce for each axis; collective.

        Returns the norm that all gradients had before, as one vector; the same on every rank.
        """
        if self._connection is None:
            raise not_launched(self.mesh)
        self._connection.comm.phase = "clipping"
        pairs = [(name, parameter.grad) for name, parameter in self.named_parameters()]
        grads = [(grad, self._is_first(name)) for name, grad in pairs if grad is not None]
        return clip_gradients(grads, max_norm, norm_type, self._connection.comm, error_if_nonfinite)

    def simulate(self, *args: Any, **kwargs: Any) -> Step:
        """One step of all ranks in this process: output, loss, whole gradients, traffic. Takes whole batches."""
        call = self._signature.call(args, kwargs)
        program = self._program((self._key(call), "whole"), call)
        with torch.no_grad():
            tensors = _named_tensors(self)
            if self._weights is not None:  # a state dict would lack buffers that are not persistent
                tensors = {name: self._weights.whole(name, tensor) for name, tensor in tensors.items()}
        seed = self.plan.seed * SEED_STRIDE
        return simulate(program, tensors, call.args, call.kwargs, backward=torch.is_grad_enabled(), seed=seed)

    # ------------------------------------------------------------ looking

    @property
    def program(self) -> AnyProgram:
        """The program of the latest kind of call. Raises InvariantError before there is one."""
        if not self._programs:
            raise InvariantError(
                "there is no program yet: it is made at the first call\n"
                "Way out: autopar.parallelize(model, mesh, example_inputs=batch), or call the model once."
            )
        return next(reversed(self._programs.values()))

    @property
    def traffic(self) -> tuple[Transfer, ...]:
        """What this rank has sent until now, by phase, axis and collective."""
        return self._connection.comm.traffic if self._connection else ()

    def timeline(self) -> Timeline:
        """When each pipeline rank computed what in the latest step, on every rank; collective. Draw it with
        :func:`autopar.schedules.draw.draw` or :func:`autopar.schedules.svg.svg`.

        Raises InvariantError where no step of a pipeline has run.
        """
        executable = self._executables.get(next(reversed(self._programs), None))
        if not isinstance(executable, PipelineExecutable):
            raise InvariantError("there is no timeline: the latest program has not run, or is not on a mesh with pp")
        return executable.timeline()

    def prepare(self, *args: Any, **kwargs: Any) -> AnyProgram:
        """Make the program of this call without running it; the tensors may be meta tensors."""
        call = self._signature.call(args, kwargs)
        return self._program(self._key(call), global_call(call, self.mesh, self.plan))

    def full_state_dict(self, *, device: str = "cpu", rank0_only: bool = False) -> dict[str, Tensor]:
        """Copies of the whole tensors under the model's names, on every rank or only on rank 0 (empty elsewhere).

        Collective; one tensor after the other is gathered.
        """
        keep = self._connection is None or self._connection.rank == 0 or not rank0_only
        found: dict[str, Tensor] = {}
        held = self.state_dict()
        for name in sorted({*held, *self._away}) if self._away or self.mesh.is_pipelined else held:
            tensor = held.get(name)
            gathered = isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements)
            whole = self._over_stages(name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            if keep:
                found[name] = whole.detach().to(device, copy=not gathered)
        return found

    def full_grads(self) -> dict[str, Tensor]:
        """The whole gradients by parameter name, those that there are; collective."""
        found = {name: parameter.grad for name, parameter in self.named_parameters() if parameter.grad is not None}
        if self.mesh.is_pipelined and self._weights is not None:
            trained = {entry.target for _, entry in self.program.placeholders(InputKind.PARAMETER)}
            names = [name for name in sorted(trained) if name in found or name in self._away]
        else:
            names = list(found)
        wholes = {name: self._weights.whole(name, grad) if self._weights else grad for name, grad in found.items()}
        return {name: self._over_stages(name, wholes.get(name)) for name in names}

    @property
    def _away(self) -> dict[str, Tensor]:
        """Outlines of what only other pipeline stages hold, by name."""
        return {missing.name: missing.outline for missing in self._weights.absent} if self._weights else {}

    def _is_first(self, name: str) -> bool:
        """Whether this rank's pipeline stage is the first of those that hold parameter ``name``."""
        first = self._first_ranks().get(name)
        return first is None or self._connection is None or first == self._connection.comm.coordinates[PIPELINE]

    def _first_ranks(self) -> dict[str, int]:
        return first_ranks(self.program) if self._programs else {}

    def _over_stages(self, name: str, whole: Tensor | None) -> Tensor:
        """A tensor that its first pipeline stage has, on all ranks."""
        if self._connection is None or name not in self._first_ranks():
            assert whole is not None
            return whole
        if whole is None or not self._is_first(name):
            like = self._away[name] if whole is None else whole
            whole = torch.zeros(like.shape, dtype=like.dtype, device=self._connection.comm.device)
        return self._connection.comm.all_reduce(whole, PIPELINE)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_model" not in self.__dict__:
                raise
        model = self.__dict__["_model"]
        found = getattr(model, name)
        if callable(found):
            raise AttributeError(
                f"'{name}' is a method of {type(model).__name__}; of those a parallel module has only forward(): "
                "what the model computes otherwise is not parallelised"
            )
        return found

    # ------------------------------------------------------------ staying the model

    def train(self, mode: bool = True) -> ParallelModule:
        super().train(mode)
        self._model.training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> ParallelModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._programs.clear()  # dtypes may have changed
        self._executables.clear()
        return self

    # ------------------------------------------------------------ programs

    def _key(self, call: Call) -> Hashable:
        gradients = tuple([table[key].requires_grad for table, key in self._slots])
        packs = self._packs_padding and not torch.is_grad_enabled()
        return self.training, cast_to(), gradients, packs, call.key

    def _executable(self, call: Call) -> Executable:
        found = self._made(call)
        assert isinstance(found, Executable)
        return found

    def _made(self, call: Call) -> Executable | PipelineExecutable:
        key = self._key(call)
        found = self._executables.get(key)
        if found is not None:
            self._programs.move_to_end(key)
        else:
            assert self._connection is not None
            program = self._program(key, global_call(call, self.mesh, self.plan))
            _check_parts(program, call)
            self._connection.agree(program)
            found = self._bound(program, self._connection)
            self._executables[key] = found
        return found

    def _bound(self, program: AnyProgram, connection: Connection) -> Executable | PipelineExecutable:
        if isinstance(program, PipelinedProgram):
            return PipelineExecutable(program, self, connection)
        return Executable(program, self, connection, self._accumulation)

    def _program(self, key: Hashable, call: Call) -> AnyProgram:
        """The program of ``key``, compiled from the whole ``call`` if there is none; the oldest makes room."""
        if key in self._programs:
            return self._programs[key]
        if self._programs and (self._connection is None or self._connection.rank == 0):
            kind = "training" if self.training else "evaluation"
            logger.warning("a new kind of call (%s, inputs %s): making another program", kind, shapes(call.tensors))
        while len(self._programs) >= PROGRAMS_KEPT:
            oldest, _ = self._programs.popitem(last=False)
            self._executables.pop(oldest, None)
        layouts = self._weights.layouts if self._weights else None
        with traceable(self, self._weights.absent if self._weights else ()):
            program = compile_program(self._model, self.mesh, self.plan, call.args, call.kwargs, layouts)
        self._programs[key] = program
        if self._weights is not None:
            self._lay_out(self._weights, program)
        return program

    def _elsewhere(self, program: AnyProgram) -> frozenset[str]:
        """Names of parameters and buffers that only other pipeline stages than those of this rank use."""
        if self._connection is None:
            return frozenset()
        return held_elsewhere(program, self._connection.comm.coordinates.get(PIPELINE, 0))

    def _lay_out(self, weights: Weights, program: AnyProgram) -> None:
        """Hold the parameters as the first program wants them; later programs have to want the same."""
        layouts = weight_layouts(program)
        if weights.layouts is None:
            weights.split(layouts, self._elsewhere(program))
            outlines = {(id(missing.table), missing.key): {missing.key: missing.outline} for missing in weights.absent}
            self._slots = [(outlines.get((id(table), key), table), key) for table, key in self._slots]
        for name, layout in layouts.items():
            held = weights.layouts.get(name, layout) if weights.layouts is not None else layout
            if layout != held:
                raise InvariantError(
                    f"this call wants parameter '{name}' as {layout}, and it is held as {held} since the first call\n"
                    "Way out: say how it is split, e.g. Plan(tensor={'" + name + "': 'column'})."
                )


def cast_to() -> tuple[torch.dtype | None, ...]:
    """What autocast is asked to compute in; a traced program has its casts as nodes."""
    kinds = ("cpu", "cuda")
    return tuple([torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds])


def _check_parts(program: AnyProgram, call: Call) -> None:
    if program.plan.inputs != "local":
        return
    nodes = [(node, entry) for node, entry in program.placeholders(InputKind.INPUT)]
    for (node, entry), tensor in zip(nodes, call.tensors):
        expected = value(node).layout.local_shape(program.mesh)
        if tuple(tensor.shape) != expected:
            raise InvariantError(
                f"input '{entry.target}': this rank's part is {list(tensor.shape)}, it has to be {list(expected)}\n"
                f"Way out: say which dim is the batch, Plan(batch_dims={{'{entry.target}': ...}}), None for none."
            )


def _named_tensors(root: nn.Module) -> dict[str, Tensor]:
    return dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers(remove_duplicate=False))
