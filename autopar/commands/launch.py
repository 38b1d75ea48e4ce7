"""Ranks for a command that needs several: torchrun in this process, and one short message when a rank fails."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import typer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from autopar.commands.orphans import LAUNCHER
from autopar.training.stopping import StopFile

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun reads the reason of a rank's failure from it
FOLLOWS = "RankFailedError"  # a rank that reports this saw another one fail
FAILURES = "AUTOPAR_FAILURES"  # a directory in which ranks leave the reasons of their failures, for restarts
FOLLOWING_S = 1.0  # how much later a rank ends that has lost another: that one is to be reported
NOT_SIGTERM = "SIGINT,SIGHUP,SIGQUIT"


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_restart() -> bool:
    """Whether torchrun has started this process after a rank had failed."""
    return is_rank() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def relaunch(ranks: int, arguments: Sequence[str], restarts: int = 0, stops: bool = False) -> None:
    """``autopar *arguments`` once per rank, by torchrun on this machine. Raises typer.Exit with the final exit code.

    When a rank fails, all start again, at most ``restarts`` times. ``stops``: the ranks handle a ``StopSignal``;
    SIGTERM asks them to stop and waits until they have. (torchrun would end them, without success, after 30 seconds.)

    This is ``python -m torch.distributed.run --standalone --nproc-per-node RANKS -m autopar ...``, without the
    traceback of its own that torchrun adds to a rank's.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default too, but it warns about it
    os.environ[LAUNCHER] = str(os.getpid())
    _hide_working_directory()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    launcher = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    launcher += ["--signals-to-handle", NOT_SIGTERM] if stops else []
    options = parse_args([*launcher, "-m", "autopar"])  # type: ignore[no-untyped-call]
    options.training_script_args = list(arguments)  # not parsed: torchrun would take options of ours for its own
    try:
        with tempfile.TemporaryDirectory(prefix="autopar-") as directory:
            os.environ[FAILURES] = directory
            _Restarts(restarts, Path(directory)).listen()
            if stops:
                StopFile(directory)
            run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        raise typer.Exit(report_failures(error.failures, ranks)) from None
    except SignalException as error:
        raise typer.Exit(128 + error.sigval) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None


class _Restarts(logging.Handler):
    """Says why all ranks start again, which torchrun only logs; of the last time :func:`report_failures` says it.

    ``reasons``: a directory with those that ranks have left.
    """

    def __init__(self, restarts: int, reasons: Path) -> None:
        super().__init__(logging.ERROR)
        self._left, self._reasons = restarts, reasons

    def listen(self) -> None:
        logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        if self._left <= 0 or len(arguments) < 2 or not str(record.msg).startswith("failed (exitcode"):
            return
        self._left -= 1
        code, rank = arguments[:2]
        how = f"was ended by signal {signal.Signals(-code).name}" if isinstance(code, int) and code < 0 else "failed"
        reason = self._reason(rank)
        why = f" ({reason})" if reason else ""
        left = f"{self._left} more times at most"
        print(f"autopar: rank {rank} {how}{why}; all ranks start again, {left}", file=sys.stderr)

    def _reason(self, rank: object) -> str:
        """The first line of what the rank has left, which is taken away: the next time it may die without a word."""
        path = self._reasons / f"rank{rank}.json"
        if not path.exists():
            return ""
        message: str = json.loads(path.read_text(encoding="utf-8"))["message"]
        path.unlink()
        return message.partition("\n")[0]


def _hide_working_directory() -> None:
    """Let ``python -m autopar`` of the ranks import nothing from where it is started, unless autopar itself is there.

    A file of that name in the directory of a program would be run otherwise.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    root = Path(__file__).resolve().parents[2]
    if root == Path.cwd().resolve():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))


def note_failure(error: Exception, text: str) -> bool:
    """Under torchrun, leave the reason of the failure where torchrun looks for it; False elsewhere."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return False
    reason = {"message": text, "kind": type(error).__name__, "timestamp": int(time.time())}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(reason), encoding="utf-8")
    if FAILURES in os.environ:
        left = Path(os.environ[FAILURES], f"rank{os.environ.get('LOCAL_RANK', '0')}.json")
        left.write_text(json.dumps(reason), encoding="utf-8")
    if reason["kind"] == FOLLOWS:
        time.sleep(FOLLOWING_S)
    return True


def report_failures(failures: dict[int, ProcessFailure], ranks: int) -> int:
    """Report why the first of ``ranks`` failed, and which others failed for the same reason; gives the exit code."""
    first = min(failures.values(), key=lambda failure: (_follows(failure), failure.timestamp, failure.local_rank))
    if first.exitcode == 1 and not first.error_file_data.get("message"):
        return 1  # a check failed, and the rank has said so itself
    same = [rank for rank in sorted(failures) if failures[rank].message == first.message]
    who = "every rank" if len(same) == ranks else f"rank {', '.join(map(str, same[:8]))}"
    reason = str(first.message)
    if first.exitcode < 0:
        reason = f"ended by signal {first.signal_name()}; the system's log may say why (memory?)"
    elif not first.error_file_data.get("message"):
        reason = f"ended with exit code {first.exitcode}; its own output says why"
    print(f"autopar: {who}: {reason}", file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 2


def _follows(failure: ProcessFailure) -> bool:
    """Whether a rank ended because another rank did: it reports so, or torchrun has ended it."""
    return failure.error_file_data.get("kind") == FOLLOWS or failure.exitcode == -signal.SIGTERM
