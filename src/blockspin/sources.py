"""The names of sources of text: one, or several that are mixed."""

from __future__ import annotations

from pathlib import Path


def sources_of(source: str | Path) -> list[str]:
    """The sources that are named, with commas between them; a file or folder whose name has a comma is one.

    Raises:
        ValueError: nothing stands before or after a comma, or a source is named twice.
    """
    if Path(source).exists() or "," not in str(source):
        return [str(source)]
    names = [name.strip() for name in str(source).split(",")]
    if "" in names:
        raise ValueError(f"{str(source)!r} names no text before or after a comma; give a,b for a mixture of two")
    if len(set(names)) < len(names):
        raise ValueError(f"{str(source)!r} names a text twice; each of a mixture has the same share")
    return names
