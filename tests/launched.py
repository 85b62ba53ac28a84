"""Runs of several processes that a launcher has started, for tests of what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
TIMES = ("seconds", "tokens_per_second")
MOST_SECONDS = 500  # that a run takes on a machine with other work; one that hangs takes more
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as launchers have it: sums do not depend on threads then


def launch(processes: int, script: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """What so many processes that run a script, given with its arguments, end with; one is started without a launcher.

    folder: where they run.
    """
    start = [sys.executable, *LAUNCHER, str(processes)] if processes > 1 else [sys.executable]
    return subprocess.run(
        [*start, *script], env=ONE_THREAD, capture_output=True, text=True, timeout=MOST_SECONDS, cwd=folder
    )


def failing_at(folder: Path, module: str, name: str, after: int) -> Path:
    """A script that runs blockspin, but for the second process, in which a function fails when it is called so often.

    module, name: of the function, within blockspin.
    """
    script = folder / "failing.py"
    script.write_text(
        f"""
import os
from blockspin.cli import main
from blockspin.{module} import {name} as whole
from blockspin import {module.split(".")[0]}

calls = []

def failing(*arguments):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) >= {after}:
        raise ValueError("a fault of the second process")
    return whole(*arguments)

{module}.{name} = failing
main()
"""
    )
    return script


def without_times(value: Any) -> Any:
    """A JSON value without what depends on the machine."""
    if isinstance(value, dict):
        return {name: without_times(entry) for name, entry in value.items() if name not in TIMES}
    return list(map(without_times, value)) if isinstance(value, list) else value
