"""Tables for the terminal, in Markdown and CSV; lists of blocks as ranges."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

GAP = "  "  # between two columns of the terminal
NARROWEST = 14  # characters that a column of words keeps, if it has as many


@dataclass(frozen=True)
class Column:
    """A heading; and whether words stand below it, which may be wrapped. Numbers stand at the right, never broken."""

    heading: str
    words: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as text below their headings, one cell a column in every row. The first column says what a row is."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""

    def text(self, width: int | None = None) -> str:
        """The table for a terminal of so many characters; None: as wide as it is.

        Words are wrapped at spaces and after commas. What is still too wide becomes several tables below one another,
        each with the first column. A line is longer than the terminal only where a single word is too long for it.
        """
        parts = []
        for part, widths in self._fitted(width or sys.maxsize):
            parts.append(self._part(part, widths))

        title = [self.title] if self.title else []
        caption = [self.caption] if self.caption else []
        return "\n".join([*title, "\n\n".join(parts), *caption])

    def markdown(self) -> str:
        """The table in Markdown, the caption below it; the title is left to the page."""
        headings, *rows = self._cells()
        marks = ["---" if column.words else "---:" for column in self.columns]
        lines = []
        for cells in (headings, marks, *rows):
            lines.append("| " + " | ".join(cells) + " |")

        # An asterisk at the start of a caption would begin a list.
        caption = ["", self.caption.replace("*", r"\*")] if self.caption else []
        return "\n".join([*lines, *caption]) + "\n"

    def _cells(self) -> list[list[str]]:
        """Headings and rows as one grid."""
        headings = [column.heading for column in self.columns]
        return [headings, *map(list, self.rows)]

    def _fitted(self, width: int) -> list[tuple[list[int], list[int]]]:
        """The columns of each part, and the width of every column, so that parts fit into `width`."""
        widest, least = [], []
        for c, cells in enumerate(zip(*self._cells(), strict=True)):
            widest.append(max(map(len, cells)))
            least.append(self._least(c, widest[c]))

        # The columns one after the other; where one does not fit, a new part begins with the first column.
        parts, needed = [[0]], least[0]
        for c in range(1, len(self.columns)):
            if needed + len(GAP) + least[c] > width and len(parts[-1]) > 1:
                parts.append([0])
                needed = least[0]
            parts[-1].append(c)
            needed += len(GAP) + least[c]

        # The room that is left goes first to the columns that lack the least, so that few are wrapped.
        fitted = []
        for part in parts:
            widths = list(least)
            room = width - len(GAP) * (len(part) - 1)
            for c in part:
                room -= least[c]
            for c in sorted(part, key=lambda c: widest[c] - least[c]):
                more = max(0, min(room, widest[c] - least[c]))
                widths[c] += more
                room -= more
            fitted.append((part, widths))
        return fitted

    def _least(self, c: int, widest: int) -> int:
        """The width below which column c would break a number or a word."""
        pieces = _pieces(self.columns[c].heading)
        for row in self.rows:
            pieces += _pieces(row[c]) if self.columns[c].words else [row[c]]
        longest = max((len(piece.rstrip()) for piece in pieces), default=0)
        return max(longest, min(widest, NARROWEST)) if self.columns[c].words else longest

    def _part(self, part: Sequence[int], widths: Sequence[int]) -> str:
        """Some of the columns, each wrapped to its width."""
        lines = []
        for cells in self._cells():
            wrapped = [_wrapped(cells[c], widths[c]) for c in part]
            for line in zip_longest(*wrapped, fillvalue=""):
                padded = []
                for c, piece in zip(part, line, strict=True):
                    words = self.columns[c].words
                    padded.append(piece.ljust(widths[c]) if words else piece.rjust(widths[c]))
                lines.append(GAP.join(padded).rstrip())
        return "\n".join(lines)


def ranges(blocks: Iterable[int]) -> str:
    """Block indices as ascending ranges: (3, 4, 5, 6, 9, 15) is "3-6,9,15"."""
    runs: list[tuple[int, int]] = []  # first and last block
    for block in sorted(blocks):
        if runs and block == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], block
        else:
            runs.append((block, block))

    texts = []
    for first, last in runs:
        texts.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(texts)


def short(number: float, unit: str = "") -> str:
    """Three digits, a decimal prefix and the unit: 2.76 MB."""
    for prefix in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g} {prefix}{unit}".rstrip()
        number /= 1000
    return f"{number:.4g} T{unit}"


def write_csv(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Records with the same keys as a CSV file, its heading the keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _pieces(text: str) -> list[str]:
    """What a cell of words may be cut into: words with the spaces after them, members of a list with their comma."""
    return re.findall(r"[^\s,]*,?\s*", text)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, but for pieces that are longer."""
    if len(text) <= width:
        return [text]

    lines = [""]
    for piece in _pieces(text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return list(map(str.rstrip, lines))
