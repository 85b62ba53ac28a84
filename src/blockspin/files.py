"""Outputs that appear under their final name only when they are whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# How safetensors and PyTorch say that the system refused to write: only the text tells.
_NOT_WRITTEN = re.compile(r"\(os error \d+\)|PytorchStreamWriter failed|file write failed|No space left")


class WriteError(ValueError):
    """The system refused to write an output."""


def check_free(path: Path) -> None:
    """Refuse the place of an output where something is; an empty folder is nothing.

    Raises:
        ValueError: there is something.
    """
    if is_taken(path):
        raise ValueError(f"{path} exists already; choose another place (--out) or remove it")


def is_taken(path: Path) -> bool:
    """Whether something is at the place of an output."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Say in one line that something could not be written (disk full, read-only folder, ...).

    path: what the body writes.

    Raises:
        WriteError: it could not be written.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise _not_written(path, _reason(error)) from error
    except Exception as error:  # the classes of other packages are not known here
        if not _NOT_WRITTEN.search(str(error)):
            raise
        raise _not_written(path, str(error).strip().splitlines()[-1]) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a file or a folder; rename it to `path` when the body succeeds.

    Raises:
        WriteError: the output cannot be written (disk full, read-only folder, ...); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            yield temporary
            _synchronise(temporary)
            temporary.replace(path)
        except BaseException:
            _remove(temporary)
            raise


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _reason(error: OSError) -> str:
    """What the system said; of a folder that was copied, what it said of the first file that could not be."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        _, _, said = error.args[0][0]  # source, target, text
        return re.sub(r"^\[Errno \d+\] |: '.*", "", said)
    return error.strerror or str(error)


def _not_written(path: str | Path, reason: str) -> WriteError:
    return WriteError(f"cannot write {path}: {reason}; make room, or choose another place (--out)")


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    """Ask the system to put the bytes on disk before the rename makes them visible."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
