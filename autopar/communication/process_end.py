"""The end of a rank's process: with a short message, and at once, when a peer is lost or the launch was wrong."""

from __future__ import annotations

import atexit
import os
import sys
import time
from functools import cache
from types import TracebackType

from autopar.errors import LaunchError, RankFailedError

RELEASE = 0.25  # seconds
_uncaught: list[BaseException] = []  # the RankFailedError that ends this process


@cache
def end_shortly() -> None:
    """Set the hooks; called when this process becomes a rank (a second call changes nothing; an import does not).

    For a fault of the launch or of a peer, only the message is printed: it tells more than the traceback, which every
    rank would print. A process that has lost its peers exits at once, with code 1: the threads of a broken process
    group would delay its end, or abort it with a core dump. Another waits a moment before Python is torn down: a thread
    of gloo that lets go of the tensors of its last collective needs the interpreter for it, and where it comes too late
    it ends the process by SIGABRT ("terminate called without an active exception").
    """
    usual = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, RankFailedError):
            _uncaught.append(error)
        if issubclass(kind, (RankFailedError, LaunchError)):
            print(f"{kind.__module__}.{kind.__qualname__}: {error}", file=sys.stderr, flush=True)
        else:
            usual(kind, error, trace)

    sys.excepthook = excepthook
    atexit.register(_leave)


def _leave() -> None:
    if _uncaught:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    time.sleep(RELEASE)
