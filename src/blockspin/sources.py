"""The names of models and texts: hub ids or paths, and several texts in one name."""

from __future__ import annotations

from pathlib import Path


def sources_of(source: str | Path) -> list[str]:
    """The texts that are named, with commas between them; a file or folder whose name has a comma is one.

    Raises:
        ValueError: nothing stands before or after a comma, or a text is named twice.
    """
    names = _parts(str(source))
    if len(names) > 1 and "" in names:
        raise ValueError(f"{str(source)!r} names no text before or after a comma; give a,b for a mixture of two")
    if len(set(names)) < len(names):
        raise ValueError(f"{str(source)!r} names a text twice; each of a mixture has the same share")
    return names


def is_hub_id(source: str) -> bool:
    """Whether a name is one of the hub, not of a file or folder."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def public_name(source: str) -> str:
    """A hub id as it is; the last part of a path, since a folder is nobody's business. Of several texts, each."""
    names = []
    for name in _parts(source):
        names.append(name if is_hub_id(name) else Path(name).name or name)
    return ",".join(names)


def _parts(source: str) -> list[str]:
    """What stands between the commas of a name; the name itself where it is a file or folder."""
    if Path(source).exists():
        return [source]
    return [name.strip() for name in source.split(",")]
