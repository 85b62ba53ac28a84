"""Several processes on one run: what is shared out, handed to all, done by one, and what happens when one fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from several import in_processes

from blockspin.journal import Journal
from blockspin.lock import locked
from blockspin.processes import from_main, gathered, is_known, is_main, num_processes, share

SIZES = (0, 1, 3, 4, 7)
WAIT = 0.05  # seconds in which others would run ahead


def squares(items: list[int], done: list[int]) -> Iterator[int]:
    for item in items:
        time.sleep(WAIT * dist.get_rank())
        done.append(item)
        yield item * item
    done.append(-1)  # the iterator came to its end


def shared_squares(size: int) -> tuple[list[int], list[int]]:
    """All squares, and what this process did of them."""
    done: list[int] = []
    found = list(gathered(squares(list(share(range(size))), done)))
    return found, done


def several_things(folder: Path) -> dict[str, object]:
    """What one process sees of everything that does not end it."""
    seen: dict[str, object] = {}
    for size in SIZES:
        seen[f"squares of {size}"] = shared_squares(size)
    seen["from main"] = from_main(dist.get_rank)
    seen["alone"] = from_main(lambda: (num_processes(), list(share([1, 2, 3])), list(gathered(iter([4])))))

    # Work that is shared out is not shared out again.
    seen["inside"] = list(gathered(from_main(lambda: len(share("abcd"))) for _ in share("ab")))

    # One that fails makes all fail, with its error.
    def failing() -> Iterator[int]:
        if not is_main():
            raise torch.OutOfMemoryError("no room")
        yield 1

    for name, call in (("shared", lambda: list(gathered(failing()))), ("main", lambda: from_main(lambda: 1 // 0))):
        try:
            call()
        except (torch.OutOfMemoryError, ZeroDivisionError) as error:
            seen[name] = type(error).__name__, is_known(error)

    # A journal and a lock that they hold together.
    with locked(folder / "out"):
        journal = Journal(folder / "journal", "theirs")
        for value in gathered(iter(share([10, 20, 30]))):
            journal.append({"value": value})
        seen["journal"] = [entry["value"] for entry in Journal(folder / "journal", "theirs").entries()]
    return seen


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_processes_do_together(processes: int, tmp_path: Path) -> None:
    everyone = in_processes(processes, tmp_path, several_things, tmp_path)
    for rank, seen in enumerate(everyone):
        for size in SIZES:
            own = list(range(size))[rank::processes]
            assert seen[f"squares of {size}"] == ([i * i for i in range(size)], [*own, -1])
        assert seen["from main"] == 0
        assert seen["alone"] == (1, [1, 2, 3], [4])
        assert seen["inside"] == [4, 4]
        assert seen["shared"] == ("OutOfMemoryError", True)
        assert seen["main"] == ("ZeroDivisionError", True)
        assert seen["journal"] == [10, 20, 30]
    assert (tmp_path / "journal").read_text().count("\n") == 4
    assert not (tmp_path / ".out.lock").exists()


def leaving_early() -> str:
    if not is_main():
        return "left"
    try:
        list(gathered(iter([1])))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.slow
def test_a_process_that_ends_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    stayed, left = in_processes(2, tmp_path, leaving_early)
    assert "another of the processes has ended" in stayed
    assert left == "left"


def test_one_process_alone_does_everything() -> None:
    assert (num_processes(), is_main()) == (1, True)
    assert share([1, 2, 3]) == [1, 2, 3]
    assert list(gathered(iter([4, 5]))) == [4, 5]
    assert from_main(lambda: 6) == 6
