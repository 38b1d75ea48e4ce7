"""A rank ends when the process that started it does, even where that was killed and could say nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

LAUNCHER = "AUTOPAR_LAUNCHER"  # the process that starts the ranks, by its number
INTERVAL_S = 0.5


def end_with_launcher() -> None:
    """From now on, end this process without delay when its parent has ended.

    A thread looks for that, so the rank may be waiting in a collective. Where ``autopar`` started the rank, a parent
    that has ended before this call counts too.
    """
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    threading.Thread(target=_watch, args=(parent,), name="end with launcher", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL_S)
    try:
        rank = os.environ.get("RANK", "?")
        print(f"autopar: rank {rank} ends: the process that started it has ended", file=sys.stderr, flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)
