"""The machine that costs are computed for: latency, bandwidth, operations a second."""

from __future__ import annotations

from dataclasses import dataclass

# A plain cost model in seconds. Only ratios matter: a collective costs a latency and its bytes, so one large
# all-reduce beats a reduce-scatter and an all-gather, and replicating a matmul beats moving a large activation only
# when it is small. Elementwise work is next to free: it follows the layouts that matmuls and collectives want.
LATENCY = 10e-6
BANDWIDTH = 100e9  # bytes/s over one link
FLOPS = 300e12


@dataclass(frozen=True)
class Machine:
    """One rank and its links. Only ratios decide where a model is cut."""

    flops: float = FLOPS  # operations per second of a product of matrices
    memory: float = 2e12  # bytes per second read and written
    link: float = BANDWIDTH  # bytes per second to another rank
    latency: float = LATENCY  # seconds of a message or a collective


ACCELERATOR = Machine()
