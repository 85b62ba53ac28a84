"""Progress bars with the time left, and messages: both on standard error, so that tables can be piped."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")

console = Console(stderr=True)
logger = logging.getLogger("blockspin")  # what only --verbose shows


def set_messages(quiet: bool, verbose: bool) -> None:
    """What a command says on standard error besides errors. Call it before transformers is imported.

    quiet: nothing. verbose: also what other packages have to say, and where an error came from.

    Raises:
        ValueError: both are wanted.
    """
    if quiet and verbose:
        raise ValueError("--quiet and --verbose exclude one another; give one of them")
    console.quiet = quiet
    if verbose:
        logging.basicConfig(level=logging.INFO)
        logger.setLevel(logging.DEBUG)
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        return

    # What matters of their messages is checked and said in a line of ours.
    logger.setLevel(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _StepsColumn(MofNCompleteColumn):
    """Steps done and in all. The last step may go past the end, as that of a budget does; it is shown as the end."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.completed <= task.total:
            return super().render(task)
        return Text(f"{int(task.total)}{self.separator}{int(task.total)}", style="progress.download")


def terminal_width() -> int:
    """Characters in a line of standard output: the terminal's or COLUMNS, else 80."""
    return Console().width


def bar(show: bool = True) -> Progress:
    """A progress display: what, how far, time spent and time left. Use as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _StepsColumn(),
        TimeElapsedColumn(),
        TextColumn("spent,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=not show,
    )


def track(items: Iterable[T], description: str, total: int, done: int = 0, show: bool = True) -> Iterable[T]:
    """Yield the items under a progress bar of `total` steps, of which an earlier run made `done`."""
    if not show:
        yield from items
        return

    with bar() as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)
