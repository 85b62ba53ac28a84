"""Removes blocks: from a model in memory, and from a checkpoint on disk without loading it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from . import __version__
from .blocks import check_removal, find_stack, shorten_config
from .files import replacing, write_json
from .models import load_config, model_without_weights
from .progress import bar

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)$|\.index\.json$")
_COPY_BYTES = 16 * 2**20


def remove_blocks(model: nn.Module, removed: Iterable[int]) -> nn.Module:
    """An ordinary transformers model without the removed blocks. It shares its weights with `model`, which stays whole.

    Raises:
        ValueError: unusable block indices, or a removal that the model's configuration cannot express.
    """
    name, stack = find_stack(model)
    removed = check_removal(removed, len(stack))
    kept = [i for i in range(len(stack)) if i not in removed]
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    smaller = copy.deepcopy(model, tensors)
    layers = nn.ModuleList(find_stack(smaller)[1][i] for i in kept)
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", position)  # noqa: B010
    smaller.set_submodule(name, layers)
    shorten_config(smaller.config, kept, len(stack))
    check_layers(model.config, smaller.config, kept)
    return smaller


def check_layers(config: Any, shortened: Any, kept: Sequence[int], trust_remote_code: bool = False) -> None:
    """Prove that each layer built from the shortened configuration is of the same make as the one it came from.

    Both models are instantiated without weights; module types, parameter shapes and plain attributes (attention type,
    sliding window, ...) of the layers are compared.

    Raises:
        ValueError: a layer differs: the configuration cannot express this removal.
    """
    before = find_stack(model_without_weights(config, trust_remote_code=trust_remote_code))[1]
    after = find_stack(model_without_weights(shortened, trust_remote_code=trust_remote_code))[1]
    for position, i in enumerate(kept):
        expected, found = _make_of(before[i]), _make_of(after[position])
        differing = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        if differing:
            raise ValueError(
                f"block {i} would become a different layer {position} in the shortened {type(config).__name__} "
                f"({', '.join(differing[:3])}); its configuration cannot express this removal"
            )


def _make_of(layer: nn.Module) -> dict[str, Any]:
    """What a layer is, without its weights: names to module types, parameter shapes and plain attribute values."""
    make: dict[str, Any] = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for name, module in layer.named_modules():
        make[name or "layer"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | None) and not key.startswith("layer_id"):
                make[f"{name}.{key}"] = value
    return make


@dataclass(frozen=True)
class _Entry:
    """One tensor of a shard: its name in the source and in the target, its header, and where its bytes lie."""

    source_name: str
    name: str
    header: dict[str, Any]
    begin: int
    end: int


def prune_checkpoint(
    source: str | Path,
    removed: Iterable[int],
    target: str | Path,
    *,
    details: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint without the removed blocks, shard by shard; the model is never loaded.

    Only names change: the bytes of each tensor are copied, whatever its dtype. The tokenizer and the other small files
    are taken along, and `blockspin.json` says what was removed from what. The target appears when it is whole.

    source: a hub id or a folder with safetensors weights.
    details: added to `blockspin.json`.

    Raises:
        ValueError: the source is unusable, the target exists, the removal cannot be expressed, or the disk is full.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose another place (--out) or remove it")
    folder = _local_folder(source)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    stack_name, stack = find_stack(model_without_weights(config, trust_remote_code=trust_remote_code))
    depth = len(stack)
    removed = check_removal(removed, depth)
    kept = [i for i in range(depth) if i not in removed]
    shortened = copy.deepcopy(config)
    shorten_config(shortened, kept, depth)
    check_layers(config, shortened, kept, trust_remote_code)
    shards = _plan(folder, kept, stack_name, depth)
    with replacing(target) as temporary:
        temporary.mkdir()
        for file in folder.iterdir():
            if file.is_file() and not _WEIGHTS.search(file.name) and file.name != "config.json":
                shutil.copy2(file, temporary / file.name)
        shortened.save_pretrained(temporary)
        _write_shards(shards, temporary, progress)
        write_json(
            temporary / "blockspin.json",
            {
                "source": str(source),
                "removed": list(removed),
                "kept": kept,
                "blockspin": __version__,
                "transformers": transformers.__version__,
                **(details or {}),
            },
        )


def checkpoint_bytes(source: str | Path, removed: Iterable[int] = (), *, trust_remote_code: bool = False) -> int:
    """Bytes of the weights on disk that the checkpoint would have without the removed blocks.

    Raises:
        ValueError: the source has no safetensors weights, or they are truncated.
    """
    folder = _local_folder(source)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    stack_name, stack = find_stack(model_without_weights(config, trust_remote_code=trust_remote_code))
    removed = check_removal(removed, len(stack))
    shards = _plan(folder, [i for i in range(len(stack)) if i not in removed], stack_name, len(stack))
    return sum(entry.end - entry.begin for _, _, entries in shards for entry in entries)


def _local_folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack"]))
    except Exception as error:  # the hub client raises errors of many kinds
        raise ValueError(f"cannot open the model {str(source)!r}: {str(error).splitlines()[0]}") from error


def _plan(
    folder: Path, kept: Sequence[int], stack_name: str, depth: int
) -> list[tuple[Path, dict[str, str], list[_Entry]]]:
    """What to copy: for each shard that keeps a tensor (path, metadata, entries in the order of their bytes)."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} has no .safetensors weights; load the model and save it with save_pretrained first")
    headers = [(path, *_read_header(path)) for path in paths]
    prefix = _layer_prefix([name for _, header, _ in headers for name in header], stack_name, depth)
    position = {i: p for p, i in enumerate(kept)}
    shards = []
    for path, header, start in headers:
        metadata = header.pop("__metadata__", {})
        entries = []
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = tensor["data_offsets"]
            match = re.match(rf"({re.escape(prefix)}\.)(\d+)(\..+)", name)
            if match and int(match[2]) not in position:
                continue
            new_name = f"{match[1]}{position[int(match[2])]}{match[3]}" if match else name
            entries.append(_Entry(name, new_name, tensor, start + begin, start + end))
        if entries:
            shards.append((path, metadata, entries))
    return shards


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
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


def _layer_prefix(names: Sequence[str], stack_name: str, depth: int) -> str:
    """How the checkpoint calls the stack: it may lack or add leading parts ("h" for "transformer.h")."""
    indices: dict[str, set[int]] = {}
    for name in names:
        for match in re.finditer(r"\.(\d+)\.", name):
            indices.setdefault(name[: match.start()], set()).add(int(match[1]))
    complete = [prefix for prefix, found in indices.items() if found == set(range(depth))]

    def shared_parts(prefix: str) -> int:
        pairs = zip(reversed(prefix.split(".")), reversed(stack_name.split(".")), strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prefix), len(stack_name)))

    matching = [prefix for prefix in complete if shared_parts(prefix) > 0]
    if not matching:
        raise ValueError(f"the checkpoint has no tensors named like the {depth} layers {stack_name}.0 and so on")
    return max(matching, key=shared_parts)


def _write_shards(shards: Sequence[tuple[Path, dict[str, str], list[_Entry]]], target: Path, progress: bool) -> None:
    """Write the planned shards and, where there are several, their index."""
    total = sum(entry.end - entry.begin for _, _, entries in shards for entry in entries)
    weight_map: dict[str, str] = {}
    with bar() as display:
        task = display.add_task("Writing (MiB)", total=total / 2**20, visible=progress)
        for number, (path, metadata, entries) in enumerate(shards, 1):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
            with path.open("rb") as source, (target / name).open("wb") as file:
                file.write(_header_bytes(entries, metadata))
                for begin, end in _runs(entries):
                    source.seek(begin)
                    for start in range(begin, end, _COPY_BYTES):
                        file.write(source.read(min(_COPY_BYTES, end - start)))
                        display.advance(task, min(_COPY_BYTES, end - start) / 2**20)
            weight_map |= {entry.name: name for entry in entries}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / "model.safetensors.index.json", index)


def _header_bytes(entries: Sequence[_Entry], metadata: dict[str, str]) -> bytes:
    """The length and the JSON header of a safetensors file that holds the entries one after another."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        size = entry.end - entry.begin
        header[entry.name] = {**entry.header, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _runs(entries: Sequence[_Entry]) -> list[tuple[int, int]]:
    """Byte ranges of the source, neighbours joined so that they are read in one go."""
    runs: list[tuple[int, int]] = []
    for entry in entries:
        if runs and runs[-1][1] == entry.begin:
            runs[-1] = (runs[-1][0], entry.end)
        else:
            runs.append((entry.begin, entry.end))
    return runs
