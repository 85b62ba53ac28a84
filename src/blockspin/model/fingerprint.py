"""Fingerprints of models and files, so that results computed for one are never taken for those of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .gguf import ordinary_source
from .loading import load_config
from .offload import offloaded_by_name, remembered

OF_WEIGHTS = "fingerprint"  # what an offloaded model remembers it as
_LENGTH = 20  # hexadecimal digits of a fingerprint
_CHUNK = 1024  # 64-bit words of a weight that are hashed by their sum
_SMALL_FILE = 2**26  # bytes; of other files than weights, larger ones do not count
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# What a configuration says of where it comes from, not of what the model computes.
_ORIGIN = ("_name_or_path", "transformers_version")


def digest(value: Any) -> str:
    """A short name of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:_LENGTH]


def of_results(model: nn.Module, samples: Sequence[Tensor], *settings: object) -> str:
    """The fingerprint of what decides a measurement: the model, the samples (1-D token ids) and some settings."""
    found = hashlib.sha256(repr([_of_weights(model), *settings]).encode())
    for sample in samples:
        found.update(len(sample).to_bytes(8, "little"))
        found.update(sample.cpu().numpy().tobytes())
    return found.hexdigest()[:_LENGTH]


def of_model(model: nn.Module | str | Path, *, trust_remote_code: bool = False) -> str:
    """The fingerprint of a model: its configuration and weights, the files of a folder, or a hub id's revision.

    Weight files are taken as unchanged while their size and time of change are.

    Raises:
        ValueError: there is no such model.
    """
    if isinstance(model, nn.Module):
        return _of_weights(model)
    folder = Path(ordinary_source(model))
    if not folder.is_dir():
        config = load_config(model, trust_remote_code=trust_remote_code)
        return digest([str(model), getattr(config, "_commit_hash", None)])

    contents, stamps = [], []
    for path in sorted(filter(Path.is_file, folder.iterdir())):
        size = path.stat().st_size
        if path.suffix in _WEIGHT_FILES:
            stamps.append((path.name, size, path.stat().st_mtime_ns))
        elif path.suffix != ".md" and size < _SMALL_FILE:
            contents.append((path.name, _of_file(path)))
    return digest([contents, stamps])


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of a tokenizer: its vocabulary, special tokens and chat template."""
    return digest([tokenizer.get_vocab(), str(tokenizer.special_tokens_map), tokenizer.chat_template])


def of_folder(folder: str | Path) -> str:
    """The fingerprint of the names and contents of all files in a folder and below."""
    folder, contents = Path(folder), []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            contents.append((str(path.relative_to(folder)), _of_file(path)))
    return digest(contents)


def _of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of_weights(model: nn.Module) -> str:
    """The fingerprint of a model: its configuration, weights and buffers; the shapes where there are none.

    Offloaded weights are read for it, so that it is that of the same model in memory.
    """
    return remembered(model, OF_WEIGHTS, lambda: _computed(model))


def _computed(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    settings = config.to_dict() if isinstance(config, PretrainedConfig) else {}
    for name in _ORIGIN:
        settings.pop(name, None)

    found = hashlib.sha256(digest(settings).encode())
    elsewhere = offloaded_by_name(model)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if name in elsewhere:
            tensor = elsewhere[name].load()

        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":
            found.update(_checksum(tensor))
    return found.hexdigest()[:_LENGTH]


def _checksum(tensor: Tensor) -> bytes:
    """The sums of a tensor's chunks, as integers, and the bytes after the last whole chunk: as fast as memory."""
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = octets.numel() // (8 * _CHUNK) * (8 * _CHUNK)
    aligned = octets[:whole] if octets.storage_offset() % 8 == 0 else octets[:whole].clone()
    sums = aligned.view(torch.int64).view(-1, _CHUNK).sum(dim=1)  # (number of chunks,)
    return bytes(sums.cpu().numpy()) + bytes(octets[whole:].cpu().numpy())
