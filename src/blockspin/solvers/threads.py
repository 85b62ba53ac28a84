"""Compiled kernels side by side in threads, each with its own pool."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from .moves import Pool, copied, merge
from .stopping import Stop


def num_workers() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(num_tasks: int, kernel: Callable[[int, Pool], None], pool: Pool, resolution: float, stop: Stop) -> None:
    """Run kernel(task, pool of its own) for every task; all pools end up in pool. Starts no more once stop expires."""
    tasks, running = iter(range(num_tasks)), set[Future[Pool]]()

    def run(task: int) -> Pool:
        own = copied(pool)
        kernel(task, own)
        return own

    with ThreadPoolExecutor(num_workers()) as threads:
        while True:
            # Two tasks a core: none waits while results are merged, and few run on when the search must stop.
            while len(running) < 2 * num_workers() and not stop.expired() and (task := next(tasks, None)) is not None:
                running.add(threads.submit(run, task))
            if not running:
                return

            done, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            for future in done:
                merge(pool, future.result(), resolution)
