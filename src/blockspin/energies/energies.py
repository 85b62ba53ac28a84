"""Energies: what predicts the loss of a model without some of its blocks. One type, one file format."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..files import replacing
from ..journal import Journal
from ..problem import Block, Floats, Sublayer, block_of


class Energies(ABC):
    """A quadratic form over the blocks: removing the blocks x (1 = removed) is predicted to cost x^T hessian x.

    A kind of energies is a subclass and a frozen dataclass: `blocks`, `metadata`, and numpy arrays. It says how the
    form is made of its arrays; saving and loading are the same for all kinds. In files its name is that of the class.

    blocks: the N units of the model, in order: its blocks, or its sub-layers.
    metadata: where the numbers come from, as text.
    """

    blocks: tuple[Block, ...]
    metadata: dict[str, str]

    shapes: ClassVar[dict[str, tuple[str, ...]]]  # of each array, what it has one entry for: "samples", "blocks"

    def __repr__(self) -> str:
        """In one line: the arrays by their shapes, not their thousands of numbers."""
        arrays = [f"{name} {getattr(self, name).shape}" for name in self.shapes]
        return f"{type(self).__name__}({len(self.blocks)} units, {', '.join(arrays)})"

    @property
    @abstractmethod
    def hessian(self) -> Floats:
        """(N, N) float64, symmetric: the matrix of the quadratic form."""

    @property
    def mean_gradient(self) -> Floats | None:
        """(N,): the first-order term that `beta` weighs; None for energies that have none."""
        return None

    @abstractmethod
    def resampled(self, generator: np.random.Generator) -> Self:
        """The energies of as many samples, drawn with replacement: one bootstrap replicate."""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: every array under its name; kind, blocks and metadata in the header.

        Raises:
            ValueError: the file cannot be written.
        """
        blocks = [asdict(block) for block in self.blocks]
        description = {"kind": _kind_name(type(self)), "blocks": blocks, "metadata": self.metadata}
        arrays = {name: getattr(self, name) for name in self.shapes}

        # One entry, because the order of several is not fixed: equal energies make equal files.
        header = {"blockspin": json.dumps(description)}
        with replacing(path) as temporary:
            temporary.write_bytes(save(arrays, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` of this kind wrote; `load_energies` reads all kinds.

        Raises:
            ValueError: there is no such file, it is truncated, or it holds something else.
        """
        return read_energies(path, [cls], _kind_name(cls))


Kind = TypeVar("Kind", bound=Energies)


def read_energies(path: str | Path, kinds: Sequence[type[Kind]], wanted: str) -> Kind:
    """Read what `Energies.save` wrote of one of these kinds. wanted: what messages call them.

    Raises:
        ValueError: there is no such file, it is truncated, or it holds something else.
    """
    remedy = "make one with `blockspin energies`"
    if not Path(path).is_file():
        raise ValueError(f"no {wanted} file at {path}; {remedy}")
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("blockspin", "{}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (OSError, SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy does not have
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); compute it again") from error

    by_name = {_kind_name(kind): kind for kind in kinds}
    name, blocks, metadata = _description(text) or ("", (), {})
    kind = by_name.get(name)
    if kind is None or set(arrays) != set(kind.shapes):
        raise ValueError(f"{path} is not a file of {wanted} of blockspin; {remedy}")

    fault = _fault(kind, arrays, len(blocks))
    if fault is not None:
        raise ValueError(f"{path}: {fault}; compute the file again")
    make: Callable[..., Kind] = kind  # a dataclass of just these
    return make(blocks=blocks, metadata=metadata, **arrays)


def _kind_name(kind: type[Energies]) -> str:
    """What files call a kind of energies."""
    return kind.__name__.lower()


def _description(text: str) -> tuple[str, tuple[Block, ...], dict[str, str]] | None:
    """Kind, blocks and metadata in the header of a file; None where it is no header of energies."""
    try:
        values = json.loads(text)
        blocks = tuple(_unit(entry) for entry in values["blocks"])
        kind, metadata = values["kind"], values["metadata"]
    except (ValueError, KeyError, TypeError):
        return None

    for position, block in enumerate(blocks):
        sound = block.index == position and isinstance(block.kind, str) and type(block.num_parameters) is int
        if not sound or block.num_parameters < 0 or type(block_of(block)) is not int:
            return None
    return (kind, blocks, metadata) if isinstance(kind, str) and isinstance(metadata, dict) else None


def _unit(entry: dict[str, Any]) -> Block:
    """A block or a sub-layer from its fields in a file. Raises TypeError where they are others."""
    return Sublayer(**entry) if "branch" in entry else Block(**entry)


def _fault(kind: type[Energies], arrays: dict[str, NDArray[Any]], num_blocks: int) -> str | None:
    """What is wrong with the arrays of a kind of energies of so many blocks; None if nothing is.

    Numbers that are not finite are no fault here: they mean "not measured", or are found when the form is used.
    """
    sampled = [arrays[name] for name, shape in kind.shapes.items() if shape[0] == "samples"]
    samples = {array.shape[0] if array.ndim else 0 for array in sampled}
    if len(samples) != 1 or 0 in samples:
        return "it has no samples, or a different number in each of its arrays"

    sizes = {"samples": samples.pop(), "blocks": num_blocks}
    for name, array in arrays.items():
        expected = tuple(sizes[of] for of in kind.shapes[name])
        if array.shape != expected:
            return f"{name} has the shape {array.shape}, not {expected}"
        if array.dtype.kind not in "fiu":
            return f"{name} holds {array.dtype}, not numbers"
        if array.dtype.kind == "i" and array.min() < 1:
            return f"{name} holds {array.min()}; every sample has one or more"
    return None


def finished_rows(journal: Journal) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(index of the sample, its numbers in one row) of every sample that `keep_rows` has put in a journal."""
    for entry in journal.entries():
        for index, row in zip(entry["indices"], entry["rows"], strict=True):
            yield index, np.array(row, dtype=np.float32)


def keep_rows(journal: Journal, indices: Sequence[int], rows: NDArray[Any]) -> None:
    """Put what was computed for a batch of samples, (batch, ...), in a journal."""
    flat = rows.reshape(len(indices), -1)
    journal.append({"indices": list(indices), "rows": flat.tolist()})
