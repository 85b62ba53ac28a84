"""Reads and writes the weights of a checkpoint shard by shard, without loading the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import first_line
from ..files import write_json
from ..progress import bar
from .renaming import Renaming

_COPY_BYTES = 2**20  # stays in the processor's cache


@dataclass(frozen=True)
class Entry:
    """One tensor to copy: its name in the target, its header, and where its bytes lie in the source.

    rows, slices: where only some slices of a dimension are kept, the tensor is `rows` rows of `slices` slices.
    kept: the slices that are kept; None: all bytes.
    """

    name: str
    header: dict[str, Any]
    begin: int
    end: int
    rows: int = 1
    slices: int = 1
    kept: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        """Elements in the target."""
        return math.prod(self.header["shape"])

    @property
    def size(self) -> int:
        """Bytes in the target."""
        whole = self.end - self.begin
        return whole if self.kept is None else whole // self.slices * len(self.kept)


@dataclass(frozen=True)
class Shard:
    """What to copy of one file, in the order of its bytes."""

    path: Path
    metadata: dict[str, str]
    entries: list[Entry]


def plan_shards(
    paths: Sequence[Path],
    renaming: Renaming,
    stack_name: str,
    sliced: dict[str, tuple[int, tuple[int, ...]]],
    tied: Sequence[Sequence[str]],
    inside: Mapping[str, Sequence[int]],
) -> list[Shard]:
    """What to copy from which file, for each file that keeps a tensor.

    sliced: tensors outside the layers with a slice for each layer: name in the model -> (dimension, shape).
    tied: names in the model of one and the same tensor; where a removed layer holds it for others, it is renamed.
    inside: shapes of the tensors of the model's layers by their names inside the stack ("0.mlp.up_proj.weight").

    Raises:
        ValueError: a file is truncated, or its tensors are not named like the layers.
    """
    headers = [(path, *read_header(path)) for path in paths]
    names = {name for _, header, _ in headers for name in header}
    shapes = {name: tensor.get("shape", ()) for _, header, _ in headers for name, tensor in header.items()}
    prefix = layer_prefix(shapes, stack_name, renaming.depth, inside)
    renamed = _new_names(names, prefix, renaming, stack_name, tied)
    shards = []
    for path, header, start in headers:
        metadata = header.pop("__metadata__", {})
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        entries = [
            _entry(name, renamed[name], tensor, start, renaming, sliced)
            for name, tensor in ordered
            if renamed[name] is not None
        ]
        if entries:
            shards.append(Shard(path, metadata, entries))
    return shards


def _new_names(
    names: set[str], prefix: str, renaming: Renaming, stack_name: str, tied: Sequence[Sequence[str]]
) -> dict[str, str | None]:
    """The new name of each tensor; None for those that are dropped."""
    renamed = {name: renaming.name(name, prefix) for name in names}
    for group in tied:
        present = [name.replace(stack_name, prefix, 1) for name in group]
        if any(renamed.get(name) is not None for name in present):
            continue
        heirs = [new for name in present if (new := renaming.name(name, prefix)) is not None]
        for name in present:
            if name in names and heirs:
                renamed[name] = heirs[0]
                break
    return renamed


def _entry(
    name: str,
    new_name: str | None,
    tensor: dict[str, Any],
    start: int,
    renaming: Renaming,
    sliced: dict[str, tuple[int, tuple[int, ...]]],
) -> Entry:
    assert new_name is not None
    begin, end = (start + offset for offset in tensor["data_offsets"])
    for model_name, (dimension, shape) in sliced.items():
        same_name = name == model_name or name.endswith(f".{model_name}") or model_name.endswith(f".{name}")
        if same_name or (name.split(".")[-2:] == model_name.split(".")[-2:] and tuple(tensor["shape"]) == shape):
            smaller = list(shape)
            smaller[dimension] = shape[dimension] // renaming.depth * len(renaming.kept)
            rows = math.prod(shape[:dimension])
            return Entry(new_name, {**tensor, "shape": smaller}, begin, end, rows, renaming.depth, tuple(renaming.kept))
    return Entry(new_name, tensor, begin, end)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data starts (8 bytes of length, header, data).

    Raises:
        ValueError: the file is truncated or not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        try:
            header: dict[str, Any] = json.loads(file.read(length)) if start <= path.stat().st_size else {}
        except ValueError:
            header = {}
    data = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if not data or start + max(data) != path.stat().st_size:
        raise ValueError(f"{path} is truncated or not a safetensors file; download it again")
    return header, start


def layer_prefix(
    shapes: Mapping[str, Sequence[int]], stack_name: str, depth: int, inside: Mapping[str, Sequence[int]]
) -> str:
    """How the checkpoint calls the stack: it may lack, add or exchange leading parts ("h" for "transformer.h").

    An image encoder may have a list of the same name that is as long, so what is in the lists is compared first.

    Raises:
        ValueError: no tensors are named like the layers, or two lists of tensors could be the layers.
    """
    indices: dict[str, set[int]] = {}
    for name in shapes:
        for match in re.finditer(r"\.(\d+)\.", name):
            indices.setdefault(name[: match.start()], set()).add(int(match[1]))
    complete = [prefix for prefix, found in indices.items() if found >= set(range(depth))]

    def shared_parts(prefix: str) -> int:
        pairs = zip(reversed(prefix.split(".")), reversed(stack_name.split(".")), strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(stack_name)))

    matching = [prefix for prefix in complete if shared_parts(prefix) > 0]
    if not matching:
        raise ValueError(f"the checkpoint has no tensors named like the {depth} layers {stack_name}.0 and so on")

    def agreement(prefix: str) -> tuple[int, int, int]:
        found = [(shapes.get(f"{prefix}.{name}"), shape) for name, shape in inside.items()]
        named = [(a, b) for a, b in found if a is not None]
        return sum(tuple(a) == tuple(b) for a, b in named), len(named), shared_parts(prefix)

    best = max(map(agreement, matching))
    fitting = sorted(prefix for prefix in matching if agreement(prefix) == best)
    if len(fitting) > 1:
        raise ValueError(f"the layers {stack_name} may be any of {', '.join(fitting)} in the checkpoint")
    return fitting[0]


def write_shards(shards: Sequence[Shard], target: Path, progress: bool) -> None:
    """Write the planned shards and, where there are several, their index."""
    total = sum(entry.size for shard in shards for entry in shard.entries)
    weight_map: dict[str, str] = {}
    with bar(progress) as display:
        task = display.add_task("Writing (MiB)", total=total / 2**20)
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            with shard.path.open("rb") as source, (target / name).open("wb") as file:
                file.write(_header_bytes(shard.entries, shard.metadata))
                for chunk in _chunks(source, shard.entries):
                    file.write(chunk)
                    display.advance(task, len(chunk) / 2**20)
            weight_map |= {entry.name: name for entry in shard.entries}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)


def _chunks(source: Any, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    """The bytes of the entries one after another, neighbours read in one go. Write each before asking for the next."""
    buffer = memoryview(bytearray(_COPY_BYTES))
    for entry, (begin, end) in _runs(entries):
        source.seek(begin)
        if entry.kept is not None:
            width = (end - begin) // entry.rows
            step = max(1, _COPY_BYTES // width)
            for row in range(0, entry.rows, step):
                block = np.frombuffer(source.read(width * min(step, entry.rows - row)), np.uint8)
                yield block.reshape(-1, entry.slices, width // entry.slices)[:, list(entry.kept)].tobytes()
        else:
            for start in range(begin, end, _COPY_BYTES):
                part = buffer[: end - start]
                if source.readinto(part) != len(part):
                    raise ValueError(f"{source.name} changed while it was read; start again")
                yield part


def _runs(entries: Sequence[Entry]) -> list[tuple[Entry, tuple[int, int]]]:
    """Byte ranges of the source, neighbours joined; each with its first entry."""
    runs: list[tuple[Entry, tuple[int, int]]] = []
    for entry in entries:
        if runs and entry.kept is None and runs[-1][0].kept is None and runs[-1][1][1] == entry.begin:
            runs[-1] = (runs[-1][0], (runs[-1][1][0], entry.end))
        else:
            runs.append((entry, (entry.begin, entry.end)))
    return runs


def _header_bytes(entries: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    """The length and the JSON header of a safetensors file that holds the entries one after another."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        header[entry.name] = {**entry.header, "data_offsets": [offset, offset + entry.size]}
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def convert_bin(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Write each PyTorch file as a safetensors file into `folder`, one after another; returns the new files.

    Raises:
        ValueError: a file is no plain dictionary of tensors.
    """
    import torch
    from safetensors.torch import save_file

    written = []
    for path in paths:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            seen: set[int] = set()
            for name in list(tensors):
                shared = tensors[name].untyped_storage().data_ptr() in seen
                seen.add(tensors[name].untyped_storage().data_ptr())
                tensors[name] = tensors[name].clone() if shared else tensors[name].contiguous()
            save_file(tensors, folder / f"{path.stem}.safetensors", metadata={"format": "pt"})
        except Exception as error:  # the unpickler raises errors of many kinds
            raise ValueError(f"{path} is not a readable PyTorch checkpoint: {first_line(error)}") from error
        written.append(folder / f"{path.stem}.safetensors")
    return written
