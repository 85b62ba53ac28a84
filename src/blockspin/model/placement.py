"""Where the weights of a model go: all to one device, or the blocks to disk, from where they are read one by one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..memory import available_memory
from ..tables import short
from .blocks import count_parameters, find_stack
from .weights import read_headers, tensor_shapes

FITS = 0.8  # of the free memory at most, for the weights; the rest is for what passes need
_RESAVED = "blockspin-offload"  # folders of weights that are on disk in another form than the checkpoint's


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model go.

    device_map: as transformers takes it. folder: for weights on disk that cannot be read as they lie in the checkpoint.
    """

    device_map: str | dict[str, str] | None
    folder: Path | None = None


def default_device() -> str:
    """Where a model runs that nobody has placed; of several processes, each has a GPU of its own."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def place_of_blocks(model: PreTrainedModel, dtype: str, device: str, stream: bool) -> str | None:
    """Where the blocks of a model go apart from the rest: "cpu", "disk"; None where all goes to the device.

    model: of the configuration, without weights. dtype: "auto" is that of the checkpoint.
    stream: they go apart though all may fit.
    """
    # What a quantised checkpoint takes, its configuration does not say.
    quantised = getattr(model.config, "quantization_config", None) is not None
    num_bytes = weights_bytes(model, dtype)
    if not stream and (quantised or fits(num_bytes, device)):
        return None

    # Beside a GPU, the host's memory is the better place.
    return "cpu" if device != "cpu" and fits(num_bytes, "cpu") else "disk"


def weights_bytes(model: PreTrainedModel, dtype: str) -> int:
    """What the weights of a model take in memory. dtype: "auto" is that of the checkpoint."""
    return count_parameters(model) * dtype_of(model.config, dtype).itemsize


def dtype_of(config: PretrainedConfig, name: str) -> torch.dtype:
    """The dtype of a name; "auto" is that of the checkpoint."""
    stored = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    found = stored if name == "auto" else name
    return found if isinstance(found, torch.dtype) else getattr(torch, found)


def fits(num_bytes: float, device: str) -> bool:
    """Whether weights of so many bytes leave room for passes on a device."""
    kind = torch.device(device)
    free = torch.cuda.mem_get_info(kind)[0] if kind.type == "cuda" else available_memory()
    return num_bytes <= FITS * free


def blocks_apart(model: nn.Module, device: str, blocks: str) -> dict[str, str]:
    """A device map with the blocks in one place ("disk", "cpu") and all else on a device.

    model: of the configuration, without weights.
    """
    stack = find_stack(model).name
    above = [part for part, _ in model.named_modules() if part == "" or stack.startswith(f"{part}.")]
    places = {}
    for name, module in model.named_modules():
        parent, _, _ = name.rpartition(".")
        if parent == stack:
            places[name] = blocks
        elif name and parent in above and name not in above and name != stack:
            places[name] = device

        # Tensors of the modules that hold the stack, beside their parts.
        if name in above:
            for own, _ in module.named_parameters(prefix=name, recurse=False):
                places[own] = device
    return places


def resaved_bytes(model: PreTrainedModel, dtype: str, paths: Iterable[Path]) -> int:
    """Bytes of the blocks' weights that cannot be read as they lie in the checkpoint.

    Those of .bin files, and those that transformers puts together from others, such as experts: they are written anew.

    model: of the configuration, without weights. paths: the files of the checkpoint.
    """
    stored = [path for path in paths if path.suffix == ".safetensors"]
    ends = {_inside_stack(name) for name in tensor_shapes(read_headers(stored))}
    needed = 0
    layers = find_stack(model).layers
    for name, parameter in layers.named_parameters():
        if name not in ends:
            needed += parameter.numel() * dtype_of(model.config, dtype).itemsize
    return needed


def _inside_stack(name: str) -> str:
    """What follows the name of a list of layers in the name of a tensor: "3.mlp.up_proj.weight"."""
    match = re.search(r"(?:^|\.)(\d+\..+)$", name)
    return match.group(1) if match else name


def delete_with(model: nn.Module, folder: Path) -> None:
    """Delete a folder when a model is gone, at the latest when the process ends."""
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def resaving_folder(needed: int) -> Path:
    """A new folder for weights that are written anew; folders that a killed process left behind are deleted.

    Raises:
        ValueError: the disk has no room for so many bytes.
    """
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_RESAVED}-*"):
        _, _, number = left.name.removesuffix("-").rpartition("-")
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)

    free = shutil.disk_usage(root).free
    if needed > free:
        raise ValueError(
            f"{short(needed, 'B')} of weights have to be written anew to be read block by block, and {root} has "
            f"{short(free, 'B')} free; choose a folder on a larger disk (TMPDIR)"
        )
    return Path(tempfile.mkdtemp(prefix=f"{_RESAVED}-", suffix=f"-{os.getpid()}", dir=root))
