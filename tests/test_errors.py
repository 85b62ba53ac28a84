"""What is shown of an error is one line, and never none."""

from __future__ import annotations

import pytest

from blockspin.errors import first_line


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
