"""The command line ``autopar``.

Exit codes: 0 all is well, 1 a check failed (numbers differ), 2 the command could not be run, and the message says why,
3 a fault of autopar, with its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from autopar import __version__
from autopar.commands.deferred import Commands
from autopar.commands.other_systems import refuse_options_of_others
from autopar.commands.split_axes import refuse_split_axes
from autopar.errors import AutoparError

MOST_LINES = 14
DEBUG, DUMP, JSON = "--debug", "--dump", "--json"

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback(invoke_without_command=True)
def autopar(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="print the version and end")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="show tracebacks; may stand anywhere")] = False,
    dump: Annotated[
        Path | None, typer.Option(DUMP, metavar="DIR", help="for programs of passes that fail; may stand anywhere")
    ] = None,
) -> None:
    """Split unmodified PyTorch models over a mesh of devices, and show every collective."""
    if version:
        print(f"autopar {__version__}")
        raise typer.Exit


def main() -> None:
    debug = DEBUG in sys.argv[1:]
    as_json = JSON in sys.argv[1:]
    try:
        arguments = _without_dump([argument for argument in sys.argv[1:] if argument != DEBUG])
        _quieten()
        refuse_options_of_others(arguments)
        refuse_split_axes(arguments)
        sys.exit(app(args=arguments, prog_name="autopar", standalone_mode=not as_json) or 0)
    except (AutoparError, ValueError) as error:
        _end(error, traceback.format_exc() if debug else _short(error), 2, as_json)
    except BrokenPipeError:  # autopar show llama | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        _end(error, traceback.format_exc() if debug else _unreadable(error), 2, as_json)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own, of a wrong option; printed by typer itself without --json
            _end(error, error.format_message(), 2, as_json)
        _end(error, f"this is a fault of autopar\n{traceback.format_exc()}", 3, as_json)


def _end(error: Exception, text: str, code: int, as_json: bool) -> NoReturn:
    if not _noted(error, text):
        if as_json:
            print(json.dumps({"error": {"kind": type(error).__name__, "message": text, "exit_code": code}}, indent=1))
        else:
            print(f"autopar: {text}", file=sys.stderr)
    sys.exit(code)


def _noted(error: Exception, text: str) -> bool:
    """Whether a launcher has taken the reason, as that of one of its ranks."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    from autopar.commands.launch import note_failure  # which imports torch

    return note_failure(error, text)


def _without_dump(arguments: list[str]) -> list[str]:
    """``arguments`` without ``--dump DIR``, which is noted in the environment, for ranks too. Raises ValueError."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != DUMP:
            kept.append(argument)
            continue
        directory = value if equals else next(rest, "")
        if not directory:
            raise ValueError(f"{DUMP} of which directory?\nWay out: {DUMP} DIR")
        os.environ["AUTOPAR_DUMP_DIR"] = str(Path(directory).resolve())
    return kept


def _unreadable(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}\nWay out: a path that exists and that you may read or write."


def _short(error: Exception) -> str:
    """The message with its notes, in a few lines."""
    lines = "\n".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])]).strip().splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... {len(lines) - MOST_LINES + 1} more lines: autopar {DEBUG} ..."]
    return "\n".join(lines)


def _quieten() -> None:
    """Notes of autopar are printed as one line by the first rank; those of the libraries below are not for users."""
    first = int(os.environ.get("RANK", "0")) == 0

    def note(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if first and "torch" not in filename.split(os.sep):
            print(f"note: {message}", file=sys.stderr)

    warnings.showwarning = note  # type: ignore[assignment]
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


if __name__ == "__main__":
    main()
