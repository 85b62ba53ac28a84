"""Where and when something was measured: the machine, the versions, the date."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from . import __version__

_PACKAGES = ("torch", "transformers")


def describe_machine() -> dict[str, str]:
    """What a report says of its origin, by heading."""
    versions = [f"blockspin {__version__}", f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        versions.append(f"{package} {version(package)}")

    processor = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores used"
    found = {
        "date": datetime.now(UTC).strftime("%d %B %Y").lstrip("0"),
        "versions": ", ".join(versions),
        "processor": processor,
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    if torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return found


def _processor() -> str:
    """The model of the processor, as far as the system tells it."""
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
