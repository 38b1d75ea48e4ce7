"""The command line ``autopar``.

Exit codes: 0 all is well, 1 a check failed (numbers differ), 2 the command could not be run, and the message says why,
3 a fault of autopar, with its traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer

from autopar import __version__
from autopar.commands.deferred import Commands
from autopar.errors import AutoparError

MOST_LINES = 14
DEBUG = "--debug"

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.callback(invoke_without_command=True)
def autopar(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="print the version and end")] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="show tracebacks; may stand anywhere")] = False,
) -> None:
    """Split unmodified PyTorch models over a mesh of devices, and show every collective."""
    if version:
        print(f"autopar {__version__}")
        raise typer.Exit


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    debug = len(arguments) < len(sys.argv) - 1
    _quieten()
    try:
        app(args=arguments, prog_name="autopar")
    except (AutoparError, ValueError) as error:
        _end(error, traceback.format_exc() if debug else _short(error), 2)
    except Exception as error:
        _end(error, f"this is a fault of autopar\n{traceback.format_exc()}", 3)


def _end(error: Exception, text: str, code: int) -> NoReturn:
    from autopar.commands.launch import note_failure  # which imports torch

    if not note_failure(error, text):
        print(f"autopar: {text}", file=sys.stderr)
    sys.exit(code)


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
