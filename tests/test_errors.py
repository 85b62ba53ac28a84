"""What is shown of an error is one line, and never none."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from blockspin.errors import first_line
from blockspin.files import WriteError, replacing


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("\n no such file \nand more"), "no such file"),
        (ValueError(), "ValueError"),
        (TypeError("field x:\n    a number is wanted\nand more"), "field x: a number is wanted"),
        (KeyError(" \n"), "' \\n'"),
    ],
)
def test_one_line_is_shown(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_folder_that_cannot_be_copied_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name in ("a", "b"):
        (tmp_path / "source" / name).write_text(name)

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    with pytest.raises(WriteError) as caught, replacing(tmp_path / "copy") as temporary:
        shutil.copytree(tmp_path / "source", temporary, copy_function=full)
    remedy = "make room, or choose another place (--out)"
    assert str(caught.value) == f"cannot write {tmp_path / 'copy'}: {os.strerror(errno.ENOSPC)}; {remedy}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
