"""One process at a time on an output: what the others are told, and what a killed process leaves is taken over."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Command

from blockspin import lock
from blockspin.lock import locked

HOLD = """
import sys, time
from blockspin.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(99)
"""

# Appends to a file under the lock, and fails if another process is between its two lines.
TAKE_TURNS = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from blockspin.lock import locked
out, done = Path(sys.argv[1]), 0
while done < 25:
    try:
        with locked(out):
            flag = os.open(out.with_name("inside"), os.O_CREAT | os.O_EXCL)
            with out.open("a") as file:
                file.write("x")
            os.close(flag)
            out.with_name("inside").unlink()
            done += 1
    except ValueError:
        time.sleep(0.001)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the output `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_process_is_told_who_is_there(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    who = rf"in use by another blockspin \(process {holder.pid} on {socket.gethostname()}\).*--out"
    for _ in range(2):
        with pytest.raises(ValueError, match=who), locked(tmp_path / "run"):
            pytest.fail("two at once")
    with locked(tmp_path / "other"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / ".run.lock").read_text())["pid"] == holder.pid
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.lock").read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    assert not list(tmp_path.iterdir())


def test_many_processes_take_turns(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "out")]
    processes = [subprocess.Popen(arguments) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert (tmp_path / "out").read_text() == "x" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_windows_locks_a_byte_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own call is played by flock."""
    places: list[int] = []

    def locking(descriptor: int, mode: int, size: int) -> None:
        places.append(os.lseek(descriptor, 0, os.SEEK_CUR))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError from error

    monkeypatch.setattr(lock, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(lock, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on "), locked(tmp_path / "run"):
            pytest.fail("two at once")
        assert min(places) >= (tmp_path / ".run.lock").stat().st_size
    assert not list(tmp_path.iterdir())


def test_folders_made_for_the_lock_go_unless_they_are_used(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b" / "run"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "file").touch()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["file"]
    with locked(None):
        pass


def test_every_command_that_writes_refuses_an_output_in_use(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    energies, out = tmp_path / "energies.safetensors", tmp_path / "out"
    teacher = shutil.copytree(tiny_folder, tmp_path / "teacher")
    data = ("--calibration", text_file)
    small = ("--max-length", 16, "--energy-samples", 4, "--energy", "empirical-fisher")
    assert command("energies", tiny_folder, *data, *small, "--out", energies)[0] == 0
    chosen = ("--energies", energies, "--remove", 1, "--data", text_file)
    for arguments in (
        ("compress", tiny_folder, "--remove", 1, *data),
        ("compare", tiny_folder, "--remove", 1, *data),
        ("energies", tiny_folder, *data),
        ("solve", energies, "--remove", 1),
        ("select", tiny_folder, *chosen),
        ("prune", tiny_folder, "--blocks", 1),
        ("evaluate", tiny_folder, "--data", text_file),
        ("distill", tiny_folder, "--teacher", teacher, "--data", text_file, "--max-length", 16),
    ):
        with locked(out):
            code, printed = command(*arguments, "--out", out)
        assert (code, f"in use by another blockspin (process {os.getpid()} on" in printed) == (2, True), printed
        assert not out.exists()
