"""The commands. Heavy imports are inside them, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from ..processes import from_main, is_known, is_main, start
from ..progress import console, logger
from .app import app

# Each adds its commands to the application; --help shows them in this order.
# isort: off
from . import runs, stages, quality, text  # noqa: F401
# isort: on

__all__ = ["app", "main"]

# What typer raises for options that do not exist, are missing or are of the wrong type.
_UsageError: Any = typer.BadParameter.__mro__[1]
_SHARED = ("demo", "compress", "compare", "energies", "gradients", "select", "evaluate", "distill")  # by processes
_INTERRUPTED = 130  # the exit code of a process that Ctrl-C ends


def main() -> None:
    """Entry point: users' mistakes end with one line and exit code 2, not with a traceback."""
    if not _meet_others():
        return
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ValueError, OSError) as error:
        logger.debug("The error came from here:", exc_info=True)
        _fail(str(error), error)
    except typer.Abort:  # what typer makes of an EOFError
        _fail("a file ends before it should; download or make it again")
    except (MemoryError, RuntimeError) as error:
        from ..memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _fail("there is not enough memory; lower --batch-size or --max-length, or free some", error)
    except _UsageError as error:
        message = error.format_message().replace("Value error, ", "").rstrip(".")  # pydantic's words
        _fail(f"{message} (see --help)")

    # Typer makes this code of Ctrl-C.
    if code == _INTERRUPTED:
        console.print("Interrupted. Run the same command again to continue.")
    sys.exit(code or 0)


def _meet_others() -> bool:
    """Meet the processes that a launcher has started beside this one; False where only the first one has work."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if command not in _SHARED:
        return os.environ.get("RANK", "0") == "0"
    start()
    return True


def _fail(message: str, error: BaseException | None = None) -> None:
    """End with a message; the main process says it where all end with the same error."""

    def tell() -> None:
        console.quiet = False
        if not is_main():
            console.file = sys.stderr  # which it does not write to otherwise
        line = " ".join(message.split())
        console.print(f"Error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)

    if error is not None and is_known(error):
        from_main(tell)
    else:
        tell()
    sys.exit(2)
