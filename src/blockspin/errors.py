"""The messages of errors that other packages raise."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one where it announces that; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
