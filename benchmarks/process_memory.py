"""Memory of this process: of tensors, and as the C library and the kernel count it, the same for whoever allocates.

With ``EXACT`` in the environment each allocation of 16 kB or more is a mapping of its own (glibc), so that it counts
from its first use to the moment that it is freed, and nothing freed stays behind.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

EXACT = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_MMAP_MAX_": "1000000"}


class _Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc 2.33 and later."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes of the allocations alive that have a mapping of their own."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    return int(mallinfo().hblkhd)


def of_tensors() -> int:
    """Bytes of the distinct storages of all tensors on the CPU that Python can see."""
    gc.collect()
    storages: dict[int, int] = {}
    for entry in gc.get_objects():
        kind = type(entry)  # isinstance would ask proxies that some libraries leave about
        if issubclass(kind, Tensor) and not issubclass(kind, (FakeTensor, DTensor)) and entry.device.type == "cpu":
            storages[entry.untyped_storage().data_ptr()] = entry.untyped_storage().nbytes()
    return sum(storages.values())


def resident() -> int:
    return _status("VmRSS")


def most_resident() -> int:
    """Since :func:`forget_most_resident`, or the start of the process."""
    return _status("VmHWM")


def forget_most_resident() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
