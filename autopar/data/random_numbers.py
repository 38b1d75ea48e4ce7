"""Random numbers of a user's data: the same on every rank, whatever else a rank draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

LARGEST = 1 << 32  # what numpy takes as a seed is below


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Within this context torch's generator of the CPU, numpy's and Python's are those of ``numbers``; afterwards all
    are as they were before.
    """
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = hash(numbers) % LARGEST  # of whole numbers, which hash alike in every process
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the devices' generators too
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
