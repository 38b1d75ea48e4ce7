"""The machine for which costs are computed: latency, bandwidth, operations per second."""

from __future__ import annotations

from dataclasses import dataclass

# A plain cost model in seconds. Only ratios matter. A collective costs a latency and its bytes, so one large all-reduce
# beats a reduce-scatter and an all-gather, and replicating a matmul beats moving a large activation only when it is
# small. Elementwise work costs almost nothing: it follows the layouts that matmuls and collectives prefer.
LATENCY = 10e-6
BANDWIDTH = 100e9  # bytes/s over one link
FLOPS = 300e12


@dataclass(frozen=True)
class Machine:
    """One rank and its links. Only ratios determine where a model is cut."""

    flops: float = FLOPS  # operations per second of a product of matrices
    memory: float = 2e12  # bytes per second read and written
    link: float = BANDWIDTH  # bytes per second to another rank
    latency: float = LATENCY  # seconds of a message or a collective


ACCELERATOR = Machine()
