"""Amounts as people write them."""

from __future__ import annotations

import pytest

from blockspin.quantities import parse_count, parse_size, parse_tokens


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("5GB", 5_000_000_000),
        ("5 gb", 5_000_000_000),
        ("5GiB", 5 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("800MB", 800_000_000),
        ("0.5TB", 500_000_000_000),
        ("12kB", 12_000),
        ("4e9", 4_000_000_000),
        ("1,024", 1024),
        ("1_024 B", 1024),
        ("80%", 0.8),
    ],
)
def test_sizes(text: str, amount: float) -> None:
    assert parse_size(text) == amount


@pytest.mark.parametrize(
    ("text", "amount"),
    [("6e9", 6_000_000_000), ("6B", 6_000_000_000), ("6b", 6_000_000_000), ("270M", 270_000_000), ("2.5%", 0.025)],
)
def test_counts(text: str, amount: float) -> None:
    assert parse_count(text) == amount


@pytest.mark.parametrize(("text", "amount"), [("4096", 4096), ("32k", 32_768), ("1M", 2**20), ("0.5k", 512)])
def test_tokens(text: str, amount: int) -> None:
    assert parse_tokens(text) == amount


@pytest.mark.parametrize("parse", [parse_size, parse_count, parse_tokens])
@pytest.mark.parametrize("text", ["", "GB", "-5GB", "five", "5 furlongs", "5GB GB", "0", "1e-9", "nan", "inf", "5..2"])
def test_what_is_no_amount_is_refused_with_what_is(parse: type, text: str) -> None:
    with pytest.raises(ValueError, match=r"must be .*, not"):
        parse(text)


@pytest.mark.parametrize("text", ["0%", "100%", "250%"])
def test_shares_are_between_nothing_and_everything(text: str) -> None:
    with pytest.raises(ValueError, match="between 0% and 100%"):
        parse_size(text)


def test_unknown_units_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown unit 'furlongs'; the units are B, kB, MB, GB, TB, KiB"):
        parse_size("5 furlongs")
    with pytest.raises(ValueError, match="unknown unit '%'"):
        parse_tokens("50%")
