"""Several processes that know each other, for tests of what they do together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def in_processes(number: int, folder: Path, body: Callable[..., T], *arguments: Any) -> list[T]:
    """What a function of a module returns in each of so many processes; what it raises in the first that raises.

    folder: where they meet.
    """
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:
        meeting = f"file://{folder / 'meeting'}"
        futures = [pool.submit(_run, rank, number, meeting, body, arguments) for rank in range(number)]
        return [future.result() for future in futures]


def _run(rank: int, number: int, meeting: str, body: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=number)
    try:
        return body(*arguments)
    finally:
        dist.destroy_process_group()
