"""Blocks that a repair has finished, kept on disk, so that a repair that was cut off continues."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import replacing
from ..journal import Journal
from ..model.offload import StoredTensor
from .report import Step


class FinishedBlocks:
    """The steps of finished blocks in a journal, and beside it a file of new weights for each.

    folder: where they are; None keeps nothing. identity: a fingerprint of what decides the results.

    Raises:
        ValueError: the folder holds the blocks of another repair, or cannot be written.
    """

    def __init__(self, folder: str | Path | None, identity: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self._journal = Journal(None if self.folder is None else self.folder / "steps.jsonl", identity)
        self._steps: dict[int, list[Step]] = {}
        for entry in self._journal.entries():
            self._steps[entry["block"]] = [Step(**step) for step in entry["steps"]]

    def restore(self, block: int, layer: nn.Module) -> list[Step] | None:
        """Give `layer` the weights of a finished block, and return its steps; None: it is not finished."""
        if block not in self._steps:
            return None
        for name, stored in self.stored(block).items():
            parameter = layer.get_parameter(name)
            owner, _, leaf = name.rpartition(".")
            new = nn.Parameter(stored.load().to(parameter.device), parameter.requires_grad)
            setattr(layer.get_submodule(owner), leaf, new)
        return self._steps[block]

    def add(self, block: int, layer: nn.Module, steps: Sequence[Step]) -> None:
        """Keep the new weights of a block; when this returns, they are on disk."""
        if self.folder is None:
            return
        weights = {}
        for step in steps:
            module = layer.get_submodule(step.projection)
            for name, parameter in module.named_parameters() if step.kept else []:
                weights[f"{step.projection}.{name}"] = parameter.detach().contiguous()
        with replacing(self._weights(block)) as temporary:
            save_file(weights, temporary)
        self._journal.append({"block": block, "steps": [asdict(step) for step in steps]})
        self._steps[block] = list(steps)

    def stored(self, block: int) -> dict[str, StoredTensor]:
        """The new weights of a finished block, by their names in it; none where the block was not changed."""
        if block not in self._steps:
            return {}
        path = self._weights(block)
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        return {name: StoredTensor(path, name) for name in names}

    def remove(self) -> None:
        """Delete what is on disk."""
        if self.folder is not None:
            shutil.rmtree(self.folder)

    def _weights(self, block: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{block}.safetensors"
