"""The one place that opens data: a dataset to its rows, a text file to pieces of its text."""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import first_line
from ..hub import can_be_hub_id, use_hub
from ..progress import console

SOURCE = "source"  # what a dataset is called in errors, where no option names it
_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}  # ending -> what opens the file
_PIECE = 2**16  # characters of a text that are read at once: tokenizers need a thousand bytes for each
_BREAK = re.compile(r"(?<=\S)\n(?=\S)")  # after it, tokenizers never join what comes before and after


def is_plain_text(source: str | Path) -> bool:
    """Whether a source is a text file, by its name."""
    return _ending(Path(source)) == ".txt"


def open_rows(source: str | Path, split: str, option: str = SOURCE) -> Sequence[dict[str, Any]]:
    """The rows of a dataset: a hub id, a local .json, .jsonl, .parquet or .csv file, also .gz or .xz, or a folder.

    option: that names it, for errors.

    Raises:
        ValueError: it does not exist, or cannot be read.
    """
    path, ending = Path(source), _ending(Path(source))
    if not path.exists() and (ending in _FORMATS or not can_be_hub_id(str(source))):
        raise unreadable(source, "there is no such file or folder, and it is no hub id", option)
    if path.is_file() and ending not in _FORMATS:
        endings = ", ".join([*_FORMATS, ".txt"])
        raise unreadable(source, f"its ending must be one of {endings}, also with .gz or .xz", option)

    import datasets

    datasets.disable_progress_bars()  # they would stand between ours
    if not path.exists():
        use_hub()
    try:
        with console.status(f"Reading {source}"):
            if path.is_file():
                rows = datasets.load_dataset(_FORMATS[ending], data_files=str(path), split="train")
            else:
                rows = datasets.load_dataset(str(source), split=split)
    except Exception as error:  # datasets raises errors of many kinds, some of its own, for data that cannot be read
        cause = error.__cause__ or error
        reason = "it holds no rows" if isinstance(cause, StopIteration) else first_line(cause)
        raise unreadable(source, reason, option) from error
    found: Sequence[dict[str, Any]] = rows
    return found


def text_pieces(path: Path, option: str = SOURCE) -> Iterator[str]:
    """A text file, .txt, .txt.gz or .txt.xz, in pieces of some ten thousand characters that end where a line does.

    option: that names it, for errors.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    open_text = _COMPRESSED.get(path.suffix, open)
    try:
        with open_text(path, "rt", encoding="utf-8") as file:
            rest = ""
            while block := file.read(_PIECE):
                rest += block
                cut = _last_break(rest)
                if cut:
                    yield rest[:cut]
                    rest = rest[cut:]
            if rest:
                yield rest
    except FileNotFoundError as error:
        raise unreadable(path, "there is no such file", option) from error
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(path, first_line(error), option) from error


def unreadable(source: str | Path, reason: str, option: str) -> ValueError:
    """The error for data that cannot be read. option: that names it."""
    return ValueError(f"cannot read the data {str(source)!r}: {reason} ({remedy(option)})")


def remedy(option: str) -> str:
    """What to give instead of data that cannot be used. option: that names it."""
    return f"{option} takes a hub id, or a local file of texts or conversations"


def _last_break(text: str) -> int:
    """Where to cut a text: after the end of its last whole line, before its last space, or nowhere (0)."""
    breaks = [match.end() for match in _BREAK.finditer(text)]
    return breaks[-1] if breaks else max(text.rfind(" "), 0)


def _ending(path: Path) -> str:
    """The ending that says what is in a file, whether it is compressed or not."""
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
