"""Which rank this process is, before the process group exists."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0
