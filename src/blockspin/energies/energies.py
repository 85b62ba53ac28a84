"""Energies: what predicts the loss of a model without some of its blocks. One type, one file format."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..files import replacing
from ..journal import Journal
from ..problem import Block, Floats

IN_HEADER = ("blocks", "metadata")  # the fields that are no arrays


class Energies(ABC):
    """A quadratic form over the blocks: removing the blocks x (1 = removed) is predicted to cost x^T hessian x.

    A kind of energies is a subclass and a frozen dataclass: `blocks`, `metadata`, and numpy arrays. It says how the
    form is made of its arrays; saving and loading are the same for all kinds.

    blocks: the N blocks of the model, in order. metadata: where the numbers come from, as text.
    """

    blocks: tuple[Block, ...]
    metadata: dict[str, str]

    kinds: ClassVar[dict[str, type[Any]]] = {}  # every kind, by the name that files hold

    def __init_subclass__(cls) -> None:
        Energies.kinds[cls.__name__.lower()] = cls

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
        description = {"kind": type(self).__name__.lower(), "blocks": blocks, "metadata": self.metadata}
        arrays = {name: getattr(self, name) for name in array_names(type(self))}

        # One entry, because the order of several is not fixed: equal energies make equal files.
        header = {"blockspin": json.dumps(description)}
        with replacing(path) as temporary:
            temporary.write_bytes(save(arrays, metadata=header))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote: any kind from `Energies.load`, that kind alone from a subclass.

        Raises:
            ValueError: there is no such file, it is truncated, or it holds something else.
        """
        wanted = cls.__name__.lower()
        remedy = "make one with `blockspin energies`"
        if not Path(path).is_file():
            raise ValueError(f"no {wanted} file at {path}; {remedy}")
        try:
            with safe_open(path, framework="numpy") as file:
                description = json.loads((file.metadata() or {}).get("blockspin", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); compute it again") from error

        kind: Any = Energies.kinds.get(description.get("kind"))
        fits = kind is not None and issubclass(kind, cls) and set(arrays) == set(array_names(kind))
        if not fits:
            raise ValueError(f"{path} is not a file of {wanted} of blockspin; {remedy}")
        blocks = tuple(Block(**entry) for entry in description["blocks"])
        energies: Self = kind(blocks=blocks, metadata=description["metadata"], **arrays)
        return energies


def array_names(kind: type[Energies]) -> list[str]:
    """The fields of a kind of energies that are arrays."""
    return [field.name for field in fields(kind) if field.name not in IN_HEADER]  # type: ignore[arg-type]


def finished_rows(journal: Journal) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(index of the sample, its numbers in one row) of every sample that `keep_rows` has put in a journal."""
    for entry in journal.entries():
        for index, row in zip(entry["indices"], entry["rows"], strict=True):
            yield index, np.array(row, dtype=np.float32)


def keep_rows(journal: Journal, indices: Sequence[int], rows: NDArray[Any]) -> None:
    """Put what was computed for a batch of samples, (batch, ...), in a journal."""
    flat = rows.reshape(len(indices), -1)
    journal.append({"indices": list(indices), "rows": flat.tolist()})
