"""Finished work kept on disk line by line, so that a run that was cut off continues instead of starting again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import is_taken, replacing
from .processes import from_main


class Journal:
    """An append-only file of JSON lines. The first line says whose results the others are.

    A process killed at any moment loses at most the entry that it was writing: a line without an end is dropped. Where
    several processes share a run, the main one has the file, and all of them make the same calls.

    path: the file, continued if it exists; None keeps nothing, so that callers need not ask whether there is a file.
    identity: a fingerprint of everything that decides the results (model, samples, settings).

    Raises:
        ValueError: the file is no journal, belongs to another identity, or cannot be written.
    """

    def __init__(self, path: str | Path | None, identity: str) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            from_main(lambda: self._open(identity))

    def entries(self) -> Iterator[dict[str, Any]]:
        """Everything that was appended, by this process or one before it, in order."""
        if self.path is not None:
            yield from from_main(self._read)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry; when this returns, it is on disk.

        Raises:
            ValueError: the file cannot be written.
        """
        if self.path is not None:
            from_main(lambda: self._write(entry))

    def _open(self, identity: str) -> None:
        assert self.path is not None

        # The first line appears whole or not at all: a file without one was written by something else.
        if not self.path.exists():
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"fingerprint": identity}) + "\n")

        if _first_line(self.path) != {"fingerprint": identity}:
            raise ValueError(
                f"{self.path} holds results of another model, other samples or other settings; remove it, or choose "
                "another folder"
            )
        _drop_torn_line(self.path)

    def _read(self) -> list[dict[str, Any]]:
        assert self.path is not None
        with self.path.open() as file:
            next(file)  # the identity
            return [json.loads(line) for line in file]

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self.path is not None
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror or error}; make room, run it again") from error


def check_settings(
    folder: Path,
    what: str,
    stored: Mapping[str, Any] | None,
    wanted: Mapping[str, Any],
    option: str = "--out",
) -> None:
    """Refuse a folder that holds other files, or results made with other settings.

    what: what the folder may hold, for the message, e.g. "run".
    stored: the settings recorded in the folder; None where it records none.
    wanted: the settings of this call. Lists and tuples count as the same.
    option: what chooses the folder, for the message.

    Raises:
        ValueError: the folder cannot be used; the message names the settings that differ.
    """
    if stored is None:
        if is_taken(folder):
            raise ValueError(f"{folder} exists and is not a {what} of blockspin; choose another folder ({option})")
        return

    kept, asked = json.loads(json.dumps([stored, wanted]))
    differing = [name for name in asked if name not in kept or kept[name] != asked[name]]
    if differing:
        raise ValueError(
            f"{folder} holds a {what} with other settings ({', '.join(differing)}); choose another folder ({option}) "
            "or remove this one"
        )


def _first_line(path: Path) -> Any:
    """What the first line says; None where it is no JSON."""
    try:
        with path.open() as file:
            return json.loads(file.readline())
    except ValueError:
        return None


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last end of a line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
