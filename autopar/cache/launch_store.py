"""The store of this launch, which all its ranks reach; this file alone asks torch's private parts for it."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, distributed_c10d  # type: ignore[attr-defined]


def launch_store() -> Any:
    """A part of the store of the process group; None for a process that has no peers.

    torchrun keeps its store when it starts the ranks again, so each attempt has a part of its own. Where machines count
    them differently they share nothing.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"programs of autopar, attempt {attempt}", distributed_c10d._get_default_store())
