"""The end of a rank's process when a peer is lost, or the launch was wrong: with a short message, and at once."""

from __future__ import annotations

import atexit
import os
import sys
from functools import cache
from types import TracebackType

from autopar.errors import LaunchError, RankFailedError

_uncaught: list[BaseException] = []  # the RankFailedError that ends this process


@cache
def end_shortly() -> None:
    """Set the hooks; called when this process becomes a rank (a second call changes nothing; an import does not).

    For a fault of the launch or of a peer, only the message is printed: it tells more than the traceback, which every
    rank would print. A process that has lost its peers exits at once, with code 1: the threads of a broken process
    group would delay its end, or abort it with a core dump.
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
    atexit.register(_leave_lost_peers)


def _leave_lost_peers() -> None:
    if _uncaught:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
