"""Removals that are known already: the paper's, or a user's own table. They are scored beside what methods choose."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..config import parse_indices
from ..problem import Removal

Known = Mapping[str, tuple[Removal, ...]]  # method -> its removals, of any sizes


def known_removals(source: str) -> Known:
    """The table of a model of the paper (its name as in `paper_models`), or of a file.

    source: a YAML file of names with blocks, such as `ours: 3-6,9`, or a list of such removals for several goals.

    Raises:
        ValueError: there is no such model or file, or the file holds something else.
    """
    tables = _paper_tables()
    if source in tables:
        return _checked(tables[source], source)
    path = Path(source)
    if not path.is_file():
        names = ", ".join(tables)
        raise ValueError(f"{source!r} is neither a file of removals nor a model of the paper: {names} (--against)")
    try:
        return _checked(yaml.safe_load(path.read_text()), source)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not a YAML file of removals (--against): {error}") from error


def paper_models() -> tuple[str, ...]:
    """The models whose removals the paper lists."""
    return tuple(_paper_tables())


def _paper_tables() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("known.yaml").read_text()
    tables: dict[str, Any] = yaml.safe_load(text)
    return tables


def _checked(table: Any, source: str) -> Known:
    """The table with every removal as block indices."""
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{source} holds no table of removals; write lines such as `ours: 3-6,9` (--against)")

    known = {}
    for name, removals in table.items():
        listed = removals if isinstance(removals, list) else [removals]
        try:
            known[str(name)] = tuple(parse_indices(str(removed)) for removed in listed)
        except ValueError as error:
            raise ValueError(f"{source}, {name}: {error} (--against)") from error
    return known
