"""The parallel module: a drop-in ``nn.Module`` around an unmodified model, one program per kind of call."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.calls import Call, Signature, global_call, shapes
from autopar.connect import Connection, not_launched
from autopar.errors import InvariantError
from autopar.execute import Executable
from autopar.layout import Layout
from autopar.lockstep import Transfer
from autopar.mesh import Mesh
from autopar.parameters import Weights, traceable
from autopar.plan import Plan
from autopar.program import InputKind, Program, value
from autopar.simulate import Step, simulate

PROGRAMS_KEPT = 8
SEED_STRIDE = 1_000_003  # seeds of runs with neighbouring plan.seed do not overlap for that many steps

logger = logging.getLogger("autopar")


class Compiler(Protocol):
    """``driver.compile_program``."""

    def __call__(
        self,
        model: nn.Module,
        mesh: Mesh,
        plan: Plan,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layouts: Mapping[str, Layout] | None,
    ) -> Program: ...


class ParallelModule(nn.Module):
    """What ``autopar.parallelize`` returns. Its submodules are the model's own, so all names are the model's too.

    Under torch.distributed the parameters are DTensors, each rank holding its part, and calling the module runs this
    rank's program. Without (``connection`` is None) there are :attr:`program` and :meth:`simulate`.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, plan: Plan, compiler: Compiler, connection: Connection | None
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not as a submodule: that would put a prefix before all names
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        for hooks in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
            self.__dict__[hooks] = model.__dict__[hooks]
        self.training = model.training
        self.mesh, self.plan = mesh, plan
        self._compiler, self._connection = compiler, connection
        self._signature = Signature(model.forward)
        self._programs: OrderedDict[Hashable, Program] = OrderedDict()
        self._executables: dict[Hashable, Executable] = {}
        self._steps = 0
        self._weights = Weights(self, connection) if connection else None

    # ------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; with ``Plan(inputs="local")`` the tensors are this rank's part of the batch."""
        if self._connection is None:
            raise not_launched(self.mesh)
        call = self._signature.call(args, kwargs)
        executable = self._executable(call)
        if self.training and torch.is_grad_enabled():
            self._steps += 1
        return executable.run(call.tensors, self.plan.seed * SEED_STRIDE + self._steps)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch; gradients are added to ``.grad``. Returns the (detached) loss."""
        loss = loss_of(self(*args, **kwargs))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def simulate(self, *args: Any, **kwargs: Any) -> Step:
        """One step of all ranks in this process: output, loss, whole gradients, traffic. Takes whole batches."""
        call = self._signature.call(args, kwargs)
        program = self._program(call, call)
        with torch.no_grad():
            tensors = self.full_state_dict() if self._connection else _named_tensors(self)
        return simulate(
            program, tensors, call.args, call.kwargs, backward=torch.is_grad_enabled(), seed=self.plan.seed * SEED_STRIDE
        )

    def compile(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        raise InvariantError("a parallel module is compiled already; torch.compile of it is Plan(compile='inductor')")
