"""Hidden states in memory up to a limit, beyond it in a temporary file that is gone when the process is."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from ..tables import short


@dataclass(frozen=True)
class InFile:
    """Where a tensor lies in the file: its first byte, and what it was."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class SpilledStates:
    """Keeps tensors; those that do not fit into the limit lie in a file, where the space of dropped ones is used again.

    memory_limit: bytes that are kept in memory. file: where the others go. Made by `spilled_states`.
    """

    def __init__(self, memory_limit: int, file: IO[bytes]) -> None:
        self.memory_limit = memory_limit
        self.held = 0  # bytes in memory
        self.in_file = 0  # bytes in the file, at most so far
        self._kept: dict[int, Tensor | InFile] = {}
        self._number = 0  # of tensors so far, which names the next one
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # bytes -> offsets of dropped tensors of that size
        self._file = file

    def add(self, tensor: Tensor) -> int:
        """Keep a tensor; returns the number by which it is found again."""
        self._number += 1
        if self.held + tensor.nbytes <= self.memory_limit:
            self.held += tensor.nbytes
            self._kept[self._number] = tensor
        else:
            self._kept[self._number] = self._write(tensor)
        return self._number

    def get(self, number: int) -> Tensor:
        """The tensor of this number."""
        kept = self._kept[number]
        return self._read(kept) if isinstance(kept, InFile) else kept

    def drop(self, number: int) -> None:
        """Forget the tensor of this number."""
        kept = self._kept.pop(number)
        if isinstance(kept, InFile):
            self._free[_size(kept)].append(kept.offset)
        else:
            self.held -= kept.nbytes

    def clear(self) -> None:
        """Forget all tensors."""
        for number in list(self._kept):
            self.drop(number)

    def _write(self, tensor: Tensor) -> InFile:
        free = self._free[tensor.nbytes]
        offset = free.pop() if free else self.in_file
        self.in_file = max(self.in_file, offset + tensor.nbytes)

        self._file.seek(offset)
        rest = memoryview(octets(tensor.cpu().contiguous()))
        while rest:
            rest = rest[self._file.write(rest) :]
        return InFile(offset, tensor.shape, tensor.dtype, tensor.device)

    def _read(self, kept: InFile) -> Tensor:
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        self._file.seek(kept.offset)
        rest = memoryview(octets(tensor))
        while rest:
            rest = rest[self._file.readinto(rest) :]  # type: ignore[attr-defined]
        return tensor.to(kept.device)


@contextmanager
def spilled_states(memory_limit: int) -> Iterator[SpilledStates]:
    """Hidden states with a file for what exceeds so many bytes.

    The file has no name from the start (on systems that allow it), so that nothing is left of it however the process
    ends.
    """
    with tempfile.TemporaryFile(prefix="blockspin-", buffering=0) as file:
        yield SpilledStates(memory_limit, file)


def check_spill_room(needed: int) -> None:
    """Refuse hidden states that the folder for temporary files has no room for.

    needed: bytes.

    Raises:
        ValueError: there is less room than that.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"the hidden states need {short(needed, 'B')} in {folder}, which has {short(free, 'B')} free: take a "
            "smaller --batch-size, or a folder on a larger disk (TMPDIR)"
        )


def octets(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    octets: memoryview = tensor.flatten().view(torch.uint8).numpy().data
    return octets


def _size(kept: InFile) -> int:
    return kept.shape.numel() * kept.dtype.itemsize
