"""One process at a time on an output: two on the same files would take each other's results."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .processes import from_main, is_main

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems say that have none
_HOLDER_BYTES = 1000  # more than a lock file has


@contextmanager
def locked(out: str | Path | None) -> Iterator[None]:
    """Keep other processes off an output, a file or a folder, while the body runs.

    The lock is a file beside the output, `.NAME.lock`, which says whose it is: {"host": ..., "pid": ...}. The system
    frees it when its process ends, however that ends, so that one which was left behind by a kill is taken over.
    Folders that had to be made for it are removed again where the body puts nothing into them. Processes that share a
    run hold it together.

    out: None where nothing is written.

    Raises:
        ValueError: another process has the output, or its place cannot be written to.
    """
    if out is None:
        yield
        return

    path, descriptor, made = from_main(lambda: _opened(Path(out).absolute()))
    try:
        yield
    finally:
        if is_main():
            _release(path, descriptor)
            _remove_empty(made)


def _opened(out: Path) -> tuple[Path, int, list[Path]]:
    """The lock file of an output, its descriptor, and the folders that had to be made for it. Raises ValueError."""
    path = out.with_name(f".{out.name}.lock")
    made = [folder for folder in out.parents if not folder.exists()]  # the innermost first
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return path, _acquired(path, out), made
    except OSError as error:
        _remove_empty(made)
        raise ValueError(f"cannot write {out}: {error.strerror or error}; choose another place (--out)") from error


def _acquired(path: Path, out: Path) -> int:
    """The descriptor of the lock file, which is this process's from now on. Raises ValueError, OSError."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(descriptor):
            held_by = _holder(descriptor)
            os.close(descriptor)
            raise ValueError(
                f"{out} is in use by another blockspin ({held_by}); wait until it is done, or choose another place "
                "(--out)"
            )

        # The one before may have removed the file between the two calls: then nobody else sees this lock.
        if _is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
            return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file, where that is possible; returns False if another process has it."""
    if sys.platform == "win32":
        # One byte behind what the file says, because others cannot read what is locked.
        os.lseek(descriptor, _HOLDER_BYTES, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    return True


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock file and free the lock; on Windows the other way round, as it removes no file that is open."""
    if sys.platform == "win32":
        os.close(descriptor)
        with suppress(PermissionError):  # another process has it by now
            path.unlink(missing_ok=True)
        return
    path.unlink(missing_ok=True)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Whose lock it is, in words."""
    try:
        known = json.loads(os.read(descriptor, _HOLDER_BYTES))
        return f"process {known['pid']} on {known['host']}"
    except (ValueError, KeyError, TypeError):  # it is writing its name just now
        return "process unknown"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # there is something in it, or it was never made
            folder.rmdir()
