"""Amounts as people write them: 5GB, 5GiB, 6e9, 6B, 32k, 25%."""

from __future__ import annotations

import re
from collections.abc import Mapping

_AMOUNT = re.compile(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([a-z%]*)\s*", re.IGNORECASE)

_SIZES = {
    "": 1,
    "B": 1,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_COUNTS = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_TOKENS = {"": 1, "k": 2**10, "M": 2**20}  # a context of 32k has 32,768 tokens


def parse_size(text: str) -> int | float:
    """A number of bytes: "5GB" is 5e9, "5GiB" is 5 * 2**30; "80%" is the share 0.8 of what there is.

    Raises:
        ValueError: it is no amount, or in another unit.
    """
    return _amount(text, _SIZES, "a size (5GB, 5GiB, 800MB) or a share (80%)", shares=True)


def parse_count(text: str) -> int | float:
    """A number of things: "6e9", "6B" and "6,000M" are 6e9; "80%" is the share 0.8 of what there is.

    Raises:
        ValueError: it is no amount, or in another unit.
    """
    return _amount(text, _COUNTS, "a number (6e9, 6B, 270M) or a share (80%)", shares=True)


def parse_tokens(text: str) -> int:
    """A number of tokens: "32k" is 32,768.

    Raises:
        ValueError: it is no amount, or in another unit.
    """
    return int(_amount(text, _TOKENS, "a number of tokens (4096, 32k)", shares=False))


def _amount(text: str, units: Mapping[str, float], wanted: str, *, shares: bool) -> int | float:
    """A whole number of the smallest unit; a share is below 1."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"must be {wanted}, not {text!r}")
    number, unit = float(match[1].replace("_", "").replace(",", "")), match[2]
    if unit == "%" and shares:
        if not 0 < number < 100:
            raise ValueError(f"must be a share between 0% and 100%, not {text!r}")
        return number / 100

    # Capitals tell nothing apart: 5gb is 5GB.
    by_lower = {name.lower(): factor for name, factor in units.items()}
    if unit.lower() not in by_lower:
        known = ", ".join(filter(None, units))
        raise ValueError(f"must be {wanted}, not {text!r}: unknown unit {unit!r}; the units are {known}")
    amount = round(number * by_lower[unit.lower()])
    if amount < 1:
        raise ValueError(f"must be {wanted} of at least 1, not {text!r}")
    return amount
