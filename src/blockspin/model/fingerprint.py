"""What identifies a model, and files: results computed for one are never taken for those of another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .loading import load_config


def digest(value: Any) -> str:
    """A short name of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def of_model(model: nn.Module | str | Path, *, trust_remote_code: bool = False) -> str:
    """Of a model in memory by its configuration and weights, of a folder by its files, of a hub id by its revision.

    Weight files are taken as unchanged while their size and time of change are.

    Raises:
        ValueError: there is no such model.
    """
    if isinstance(model, nn.Module):
        return _of_weights(model)
    folder = Path(model)
    if not folder.is_dir():
        config = load_config(model, trust_remote_code=trust_remote_code)
        return digest([str(model), getattr(config, "_commit_hash", None)])
    files = sorted(path for path in folder.iterdir() if path.is_file())
    small = [
        (path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
        if path.suffix != ".md" and path.stat().st_size < 2**26 and not _holds_weights(path)
    ]
    large = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if _holds_weights(path)]
    return digest([small, large])


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of its vocabulary, special tokens and chat template."""
    return digest([tokenizer.get_vocab(), str(tokenizer.special_tokens_map), tokenizer.chat_template])


def of_folder(folder: str | Path) -> str:
    """Of the names and contents of all files in a folder and below."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest([(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


def _holds_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def _of_weights(model: nn.Module) -> str:
    found = hashlib.sha256(str(getattr(model, "config", "")).encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:20]
