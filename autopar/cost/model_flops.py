"""Floating-point operations that the model itself needs for a step, whichever way it is split.

Forward is counted from the program, on whole tensors: what several ranks compute alike counts once. Backward counts
twice that, and what is computed a second time does not count: so utilisation of a device is defined (Chowdhery et al.
2022, "PaLM", appendix B).
"""

from __future__ import annotations

from autopar.cost.flops import flops
from autopar.ir.program import AnyProgram

BACKWARD = 2  # products for one of forward: the gradients of both operands


def forward_flops(program: AnyProgram) -> int:
    """Of one run, on all ranks together: of one microbatch, where a batch runs in several."""
    return sum(flops(node, lambda kind: kind.shape) for node in program.graph.nodes)


def learning_flops(program: AnyProgram) -> int:
    """Of one run of forward and backward."""
    return (1 + BACKWARD) * forward_flops(program)
