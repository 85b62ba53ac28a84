"""Tables at any width: nothing is lost or broken. Lists of blocks as ranges."""

from __future__ import annotations

import csv
from itertools import combinations
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from blockspin.config import parse_indices
from blockspin.tables import Column, Table, ranges, short, write_csv

BLOCKS = "0,2-4,7,9,11-13,15,17,19,21,23-25,27,29,31-40,42,44,46,48-50,52,54,56,58-60"
TABLE = Table(
    [Column("model", words=True), Column("removed blocks", words=True), Column("loss above the chosen"), Column("MB")],
    [["original", "", "0.0000 ±0.0000", "16,060"], ["chosen (resampled)", BLOCKS, "0.1234 ±0.0567", "12,345 77%"]],
    title="remove 25%",
    caption="* a remark",
)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_numbers_stay_whole(width: int) -> None:
    lines = TABLE.text(width).splitlines()
    assert max(map(len, lines)) <= width
    for number in ("0.0000 ±0.0000", "16,060", "0.1234 ±0.0567", "12,345 77%"):
        assert sum(number in line for line in lines) == 1


@pytest.mark.parametrize("width", [30, 50, 80, 120])
def test_lists_of_blocks_are_cut_only_after_commas(width: int) -> None:
    table = Table([Column("model", words=True), Column("removed blocks", words=True)], [["CBO:0", BLOCKS]])
    heading, *lines = table.text(width).splitlines()
    parts = [line[heading.index("removed") :] for line in lines]
    assert "".join(parts) == BLOCKS
    assert all(part.endswith(",") for part in parts[:-1])


def test_a_narrow_terminal_gets_parts_that_repeat_the_first_column() -> None:
    wide, narrow = TABLE.text(), TABLE.text(40)
    assert "\n\n" not in wide
    assert len(wide.splitlines()) == 5
    parts = narrow.split("\n\n")
    assert len(parts) > 1
    assert all("model" in part and "original" in part and "chosen" in part for part in parts)


def test_a_markdown_reader_finds_every_cell() -> None:
    tokens = MarkdownIt().enable("table").parse(TABLE.markdown())
    cells = [token.content for token in tokens if token.type == "inline"]
    expected = [column.heading for column in TABLE.columns] + [cell for row in TABLE.rows for cell in row]
    assert [cell.replace("\\*", "*") for cell in cells] == [*expected, TABLE.caption]
    assert "bullet_list_open" not in [token.type for token in tokens]


def test_csv_files_are_read_back(tmp_path: Path) -> None:
    records = [{"method": "a, b", "loss": 0.1}, {"method": 'the "best"', "loss": 1e-17}]
    write_csv(records, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [(row["method"], float(row["loss"])) for row in read] == [(r["method"], r["loss"]) for r in records]


def test_ranges_and_back() -> None:
    assert ranges((3, 4, 5, 6, 9, 15)) == "3-6,9,15"
    assert ranges(()) == ""
    for size in range(1, 8):
        for blocks in combinations(range(7), size):
            assert parse_indices(ranges(blocks)) == blocks
    for text in ("", "a", "3-", "-3", "6-3", "1,,2", "1-2-3", "1.5"):
        with pytest.raises(ValueError, match="separated by commas"):
            parse_indices(text)


def test_short_numbers() -> None:
    assert [short(n) for n in (0, 999, 2_756_400, 3.2e12)] == ["0", "999", "2.76 M", "3.2 T"]
    assert [short(n, "B") for n in (512, 134_515_008)] == ["512 B", "135 MB"]
