"""A compiler whose ``ep`` splits parameters, as ``route_experts`` does, in models without experts.

Rows are split over ``dp`` alone; then ``ep`` splits weights as ``tp`` would. Parameters of all three kinds come of it:
split over ``ep``, whole on it and used alike, whole and used differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from unittest import mock

from autopar import compiler
from autopar.ir.graph_pass import graph_pass
from autopar.ir.program import Program
from autopar.passes import COMPILER
from autopar.passes.route_experts import route_experts
from autopar.passes.split_tensors import split_tensors
from autopar.split.split_axis import split_axis
from autopar.split.tensor_policy import TensorPolicy


@contextmanager
def experts_split() -> Iterator[None]:
    """The compiler with a pass that splits weights over ``ep`` before ``split_tensors``, without ``route_experts``."""

    @graph_pass()
    def split_weights(program: Program) -> Program:
        return split_axis(program, TensorPolicy({}, axis="ep"))

    phases = []
    for phase in COMPILER:
        added = [(split_weights, step) if step is split_tensors else (step,) for step in phase.passes]
        kept = (step for steps in added for step in steps if step is not route_experts)
        phases.append(replace(phase, passes=tuple(kept)))
    batches = import_module("autopar.passes.split_batch")
    without = mock.patch.object(batches, "DATA_AXES", ("dp", "dp_replicate", "dp_shard"))
    with mock.patch.object(compiler, "COMPILER", tuple(phases)), without:
        yield
