"""How much memory this process may still take: what the machine has free, or less where a limit is set."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import psutil
import torch

if sys.platform != "win32":  # which sets no limits of this kind
    import resource

STATES_SHARE = 1 / 8  # of the free memory, for the hidden states that are kept for later passes
_M_MMAP_THRESHOLD = -3  # of malloc.h
_MAPPED_BYTES = 2**17  # from which on a tensor has pages of its own; what glibc begins with
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIPS = Path("/proc/self/cgroup")  # of this process
# Of control groups, version 2 and 1: the limit, what is used, and what of it is a cache of files, which goes first.
_FILES_2 = ("memory.max", "memory.current", "inactive_file")
_FILES_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory() -> int:
    """Bytes of the host's memory that this process may still take.

    That is what is free, at most what is left of the limit of its control group (containers, systemd) and of its data
    segment (ulimit -d). Where a launcher has started several processes on this machine, each has its share.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    left = [free // processes for free in (int(psutil.virtual_memory().available), *_left_in_groups())]
    if sys.platform != "win32":
        most, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if most != resource.RLIM_INFINITY:
            left.append(most - psutil.Process().memory_info().data)
    return max(0, min(left))


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device; what PyTorch keeps there for later use is free.

    Processes that share a host share its memory.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return available_memory()


class OutOfMemory(ValueError):
    """Something does not fit into memory however it is cut."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host, where PyTorch only says it in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give pages of freed tensors back to the system, where the C library is glibc, which keeps those below others."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def map_tensors() -> None:
    """From here on, have glibc give each tensor pages of its own, which go back to the system with it.

    By itself it takes tensors of up to 32 MB from its heap once such ones were freed, and there a freed one stays as
    long as anything above it is in use.
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def states_limit(device: torch.device) -> int:
    """Bytes on a device for hidden states that are kept for later passes."""
    return int(STATES_SHARE * free_memory(device))


def _left_in_groups() -> list[int]:
    """Bytes that are left of the limits of the control groups of this process."""
    if not _MEMBERSHIPS.is_file():
        return []

    left = []
    for line in _MEMBERSHIPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            left += _left(_CGROUPS / path.lstrip("/"), _FILES_2)
        elif "memory" in controllers.split(","):
            left += _left(_CGROUPS / "memory" / path.lstrip("/"), _FILES_1)
    return left


def _left(group: Path, files: tuple[str, str, str]) -> list[int]:
    """What is left in a control group and in those above it; nothing where no limit is set or it cannot be read."""
    limit_file, usage_file, cache = files
    left = []
    while group.is_relative_to(_CGROUPS) and group != _CGROUPS.parent:
        try:
            limit = int((group / limit_file).read_text())
            used = int((group / usage_file).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            left.append(limit - used + int(statistics[cache]))
        except (OSError, ValueError, KeyError):  # no such file here, or "max"
            pass
        group = group.parent
    return left
