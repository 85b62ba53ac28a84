"""Rows of measurements as JSON lines: what is there is not made again, and no row begins when the time is up."""

from __future__ import annotations

import json
import math
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    """The rows that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_seconds(parser: ArgumentParser) -> None:
    """The option that ends a run in time."""
    parser.add_argument("--seconds", type=float, default=math.inf, help="no row begins after so long")


def make_missing(wanted: Mapping[str, Callable[[], Row]], out: Path, started: float, seconds: float) -> None:
    """Make the rows that the file lacks, each kept as soon as it is there.

    wanted: what makes each row, by its key, the most important first. A row has its KL divergences, "kl": kind of text
        -> a number for each sample, and "seconds". One that does not fit into memory is left for another run.
    started: by time.perf_counter; no row begins `seconds` later.
    """
    done = {row["key"] for row in load(out)}
    missing = [key for key in wanted if key not in done]
    for number, key in enumerate(missing):
        if time.perf_counter() - started > seconds:
            print(f"{len(missing) - number} rows are left; run again to continue")
            break

        try:
            row = {"key": key, **wanted[key]()}
        except torch.OutOfMemoryError as error:  # others may use the card
            print(f"{key}: {error}", flush=True)
            torch.cuda.empty_cache()
            continue
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        means = {kind: round(float(np.mean(values)), 3) for kind, values in row["kl"].items()}
        print(f"{time.perf_counter() - started:5.0f} s  {key}: {means}, {row['seconds']:.1f} s", flush=True)
