"""Progress bars with the time left, and messages: both on standard error, so that tables can be piped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(stderr=True)


def terminal_width() -> int:
    """Characters in a line of standard output: the terminal's or COLUMNS, else 80."""
    return Console().width


def bar(show: bool = True) -> Progress:
    """A progress display: what, how far, time spent and time left. Use as a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
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
