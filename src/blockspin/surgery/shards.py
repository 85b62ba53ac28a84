"""Reads and writes the weights of a checkpoint shard by shard, without loading the model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import write_json
from ..model.weights import LENGTH_BYTES, WeightFile, tensor_shapes
from ..progress import bar
from .renaming import Renaming

_COPY_BYTES = 2**20  # stays in the processor's cache
_ALIGNMENT = 8  # bytes; where the data starts


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

    @property
    def size(self) -> int:
        """Bytes of data in the target."""
        return sum(entry.size for entry in self.entries)


def plan_shards(
    files: Sequence[WeightFile],
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
        ValueError: no tensors are named like the layers.
    """
    shapes = tensor_shapes(files)

    # How the checkpoint calls the layers, and what it calls each tensor afterwards.
    prefix = layer_prefix(shapes, stack_name, renaming.depth, inside)
    new_names = _new_names(shapes, prefix, renaming, stack_name, tied)

    shards = []
    for file in files:
        entries = []
        # In the order of their bytes, so that neighbours are read in one go.
        for name, tensor in sorted(file.tensors.items(), key=lambda item: item[1]["data_offsets"]):
            new_name = new_names[name]
            if new_name is None:
                continue
            dimension = _sliced_dimension(name, tensor["shape"], sliced)
            entries.append(_entry(new_name, tensor, file.start, dimension, renaming))
        if entries:
            shards.append(Shard(file.path, file.metadata, entries))
    return shards


def _new_names(
    names: Collection[str], prefix: str, renaming: Renaming, stack_name: str, tied: Sequence[Sequence[str]]
) -> dict[str, str | None]:
    """The new name of each tensor; None for those that are dropped."""
    renamed = {name: renaming.name(name, prefix) for name in names}

    # A tensor that kept layers share with a removed one may be stored under the name in the removed one.
    for group in tied:
        stored = [name.replace(stack_name, prefix, 1) for name in group]
        if any(renamed.get(name) is not None for name in stored):
            continue
        new_names = [renaming.name(name, prefix) for name in stored]
        heirs = list(filter(None, new_names))
        holders = [name for name in stored if name in names]
        if heirs and holders:
            renamed[holders[0]] = heirs[0]
    return renamed


def _sliced_dimension(name: str, shape: Sequence[int], sliced: Mapping[str, tuple[int, tuple[int, ...]]]) -> int | None:
    """The dimension in which a tensor of the checkpoint has a slice for each layer; None if it has not."""
    for model_name, (dimension, model_shape) in sliced.items():
        same_name = name == model_name or name.endswith(f".{model_name}") or model_name.endswith(f".{name}")
        same_end = name.split(".")[-2:] == model_name.split(".")[-2:]
        if same_name or (same_end and tuple(shape) == model_shape):
            return dimension
    return None


def _entry(new_name: str, tensor: dict[str, Any], start: int, dimension: int | None, renaming: Renaming) -> Entry:
    """What to copy of a tensor, given its header and where the data of the file starts."""
    first, last = tensor["data_offsets"]
    begin, end = start + first, start + last
    if dimension is None:
        return Entry(new_name, tensor, begin, end)

    # Seen as rows of slices, of which each row keeps the same ones.
    shape = list(tensor["shape"])
    rows = math.prod(shape[:dimension])
    shape[dimension] = shape[dimension] // renaming.depth * len(renaming.kept)
    return Entry(new_name, {**tensor, "shape": shape}, begin, end, rows, renaming.depth, tuple(renaming.kept))


def layer_prefix(
    shapes: Mapping[str, Sequence[int]], stack_name: str, depth: int, inside: Mapping[str, Sequence[int]]
) -> str:
    """How the checkpoint calls the stack: it may lack, add or exchange leading parts ("h" for "transformer.h").

    An image encoder may have a list of the same name that is as long, so what is in the lists is compared first.

    Raises:
        ValueError: no tensors are named like the layers, or two lists of tensors could be the layers.
    """
    indices: dict[str, set[int]] = {}  # name of a list -> the indices found in it
    for name in shapes:
        for match in re.finditer(r"\.(\d+)\.", name):
            indices.setdefault(name[: match.start()], set()).add(int(match[1]))

    def shared_parts(prefix: str) -> int:
        """How many parts two names have in common at their ends."""
        parts, stack_parts = prefix.split("."), stack_name.split(".")
        shared = 0
        while parts and stack_parts and parts.pop() == stack_parts.pop():
            shared += 1
        return shared

    def agreement(prefix: str) -> tuple[int, int, int]:
        """How many tensors of the layers have the right shape and the right name, and parts of the name in common."""
        named = right = 0
        for name, shape in inside.items():
            found = shapes.get(f"{prefix}.{name}")
            named += found is not None
            right += found is not None and tuple(found) == tuple(shape)
        return right, named, shared_parts(prefix)

    # Lists that are long enough and called alike; what is in them decides.
    agreements = {}
    for prefix, found in indices.items():
        if found >= set(range(depth)) and shared_parts(prefix) > 0:
            agreements[prefix] = agreement(prefix)
    if not agreements:
        raise ValueError(f"the checkpoint has no tensors named like the {depth} layers {stack_name}.0 and so on")

    best = max(agreements.values())
    fitting = sorted(prefix for prefix in agreements if agreements[prefix] == best)
    if len(fitting) > 1:
        raise ValueError(f"the layers {stack_name} may be any of {', '.join(fitting)} in the checkpoint")
    return fitting[0]


def write_shards(shards: Sequence[Shard], target: Path, progress: bool) -> None:
    """Write the planned shards and, where there are several, their index."""
    total = sum(shard.size for shard in shards)
    weight_map: dict[str, str] = {}
    with bar(progress) as display:
        task = display.add_task("Writing (MiB)", total=total / 2**20)
        for number, shard in enumerate(shards, 1):
            # The names that transformers gives its files.
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            with shard.path.open("rb") as source, (target / name).open("wb") as file:
                file.write(_header_bytes(shard))
                for chunk in _chunks(source, shard.entries):
                    file.write(chunk)
                    display.advance(task, len(chunk) / 2**20)
            for entry in shard.entries:
                weight_map[entry.name] = name

    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)


def _chunks(source: BinaryIO, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    """The bytes of the entries one after another, neighbours read in one go. Write each before asking for the next."""
    buffer = memoryview(bytearray(_COPY_BYTES))
    for entry, (begin, end) in _runs(entries):
        source.seek(begin)
        if entry.kept is None:
            for start in range(begin, end, _COPY_BYTES):
                part = buffer[: end - start]
                if source.readinto(part) != len(part):  # type: ignore[attr-defined]
                    raise ValueError(f"{source.name} changed while it was read; start again")
                yield part
            continue

        width = (end - begin) // entry.rows  # bytes of a row
        rows_at_once = max(1, _COPY_BYTES // width)
        for row in range(0, entry.rows, rows_at_once):
            rows = min(rows_at_once, entry.rows - row)
            block = np.frombuffer(source.read(width * rows), np.uint8)  # (rows * width,)
            slices = block.reshape(rows, entry.slices, -1)  # (rows, slices, bytes of a slice)
            yield slices[:, list(entry.kept)].tobytes()


def _runs(entries: Sequence[Entry]) -> list[tuple[Entry, tuple[int, int]]]:
    """Byte ranges of the source, neighbours joined; each with its first entry."""
    runs: list[tuple[Entry, tuple[int, int]]] = []
    for entry in entries:
        if runs and entry.kept is None:
            first, (begin, end) = runs[-1]
            if first.kept is None and end == entry.begin:
                runs[-1] = first, (begin, entry.end)
                continue
        runs.append((entry, (entry.begin, entry.end)))
    return runs


def _header_bytes(shard: Shard) -> bytes:
    """The length and the JSON header of a safetensors file that holds the entries of a shard one after another."""
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    offset = 0
    for entry in shard.entries:
        header[entry.name] = {**entry.header, "data_offsets": [offset, offset + entry.size]}
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
