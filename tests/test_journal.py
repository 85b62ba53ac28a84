"""What a journal gives back after being cut off anywhere, and which folders may be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blockspin.journal import Journal, check_settings

ENTRIES: list[dict[str, Any]] = [{"indices": [0, 1], "rows": [[0.5, -1.25], [3.0, 1e-30]]}, {"name": "möglich"}, {}]


def test_a_journal_cut_off_at_any_byte_keeps_the_whole_entries_and_continues(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "journal.jsonl"
    journal = Journal(path, "a")
    ends = [path.stat().st_size]
    for entry in ENTRIES:
        journal.append(entry)
        ends.append(path.stat().st_size)
    content = path.read_bytes()

    for length in range(ends[0], len(content) + 1):
        path.write_bytes(content[:length])
        number = sum(end <= length for end in ends) - 1
        again = Journal(path, "a")
        assert list(again.entries()) == ENTRIES[:number]
        again.append({"last": length})
        assert list(Journal(path, "a").entries()) == [*ENTRIES[:number], {"last": length}]


def test_a_journal_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "a").append({"n": 1})
    others = [path.read_bytes(), b"", b"notes", b"notes\n", b"[1]\n", b"\xff\xfe\n"]
    for content in others:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="another model, other samples or other settings"):
            Journal(path, "b")
        assert path.read_bytes() == content


def test_a_journal_without_a_file_keeps_nothing() -> None:
    journal = Journal(None, "a")
    journal.append({"n": 1})
    assert list(journal.entries()) == []


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "a")
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*journal\.jsonl"):
        journal.append({"n": 1})


def test_a_folder_continues_only_with_the_same_settings(tmp_path: Path) -> None:
    stored = {"model": "a", "protect": [0, 1], "seed": 42, "extra": None}
    check_settings(tmp_path, "run", stored, {"model": "a", "protect": (0, 1), "seed": 42})
    with pytest.raises(ValueError, match=r"a run with other settings \(protect, seed, beta\); .*--out"):
        check_settings(tmp_path, "run", stored, {"model": "a", "protect": (0,), "seed": 43, "beta": None})


def test_a_folder_without_settings_must_be_empty(tmp_path: Path) -> None:
    check_settings(tmp_path / "missing", "run", None, {})
    check_settings(tmp_path, "run", None, {})
    (tmp_path / "file").touch()
    for used in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is not a run of blockspin; choose another folder"):
            check_settings(used, "run", None, {})
