"""Removes blocks from a checkpoint on disk, without loading it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .. import __version__
from ..errors import first_line
from ..files import replacing, write_json
from ..model.blocks import check_images, check_removal, find_stack, other_lists
from ..model.gguf import ordinary_source
from ..model.loading import load_config, model_without_weights
from ..progress import console
from .layer_config import Shortened, shorten_config
from .proof import check_attention, tied_names
from .renaming import Renaming
from .shards import Shard, convert_bin, plan_shards, write_shards

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)$|\.index\.json$")
_QUANTISATION = re.compile(r"quant\w*\.json$")


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

    Only names change: the bytes of each tensor are copied, whatever its dtype. Entries of a quantisation configuration
    that name layers follow. The tokenizer and the other small files are taken along, and `blockspin.json` says what
    was removed from what. PyTorch `.bin` weights become safetensors. The target appears when it is whole.

    source: a hub id or a folder with safetensors (or .bin) weights.
    details: added to `blockspin.json`.

    Raises:
        ValueError: the source is unusable, the target exists, the removal cannot be expressed, or the disk is full.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose another place (--out) or remove it")
    folder = local_folder(source)
    removed = sorted(int(i) for i in removed)

    with (
        _planned(folder, removed, trust_remote_code) as (shortened, shards, stack_name),
        replacing(target) as temporary,
    ):
        temporary.mkdir()
        _copy_small_files(folder, temporary, stack_name, shortened.renaming, other_lists(shortened.model))
        write_json(temporary / "config.json", shortened.values)
        write_shards(shards, temporary, progress)
        origin = {
            "source": str(source),
            "removed": removed,
            "kept": list(shortened.renaming.kept),
            "blockspin": __version__,
            "transformers": transformers.__version__,
        }
        write_json(temporary / "blockspin.json", origin | (details or {}))

    if progress and _changes_order(load_config(folder, trust_remote_code=trust_remote_code), shortened.renaming.kept):
        console.print(
            "Layers with and without a sliding window follow one another in another order now. transformers reads it "
            "from the configuration; before use in vLLM or llama.cpp see docs/loading_elsewhere.md."
        )


def _changes_order(config: PretrainedConfig, kept: Sequence[int]) -> bool:
    """Whether some position has a layer of another attention or rotation than before, which some runtimes overlook."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    has_windows = any(re.match("sliding|chunked", str(kind)) for kind in kinds)
    rotated = getattr(text, "no_rope_layers", None) or []

    for entries in (kinds if has_windows else [], rotated):
        for position, i in enumerate(kept):
            if i < len(entries) and entries[i] != entries[position]:
                return True
    return False


def checkpoint_bytes(source: str | Path, removed: Iterable[int] = (), *, trust_remote_code: bool = False) -> int:
    """Bytes of the weights on disk that the checkpoint would have without the removed blocks.

    Raises:
        ValueError: the source has no usable weights, or the removal cannot be expressed.
    """
    with _planned(local_folder(source), removed, trust_remote_code) as (_, shards, _):
        return sum(shard.size for shard in shards)


@contextmanager
def _planned(
    folder: Path, removed: Iterable[int], trust_remote_code: bool
) -> Iterator[tuple[Shortened, list[Shard], str]]:
    """The proven configuration, what to copy, and the name of the stack. While it is open, .bin weights lie converted
    in a temporary folder."""
    config = load_config(folder, trust_remote_code=trust_remote_code)

    def build(config: PretrainedConfig) -> PreTrainedModel:
        return model_without_weights(config, trust_remote_code=trust_remote_code)

    model = build(config)
    stack_name, stack = find_stack(model)
    removed = check_removal(removed, len(stack))
    kept = [i for i in range(len(stack)) if i not in removed]
    check_attention(model, kept)
    check_images(model, removed)
    shortened = shorten_config(config, kept, build, json.loads((folder / "config.json").read_text()))

    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers()))
    inside = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{stack_name}."):
            inside[name.removeprefix(f"{stack_name}.")] = tensor.shape
    sliced = {name: (dimension, tuple(tensors[name].shape)) for name, dimension in shortened.slices.items()}

    paths, bins = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not paths and not bins:
        raise ValueError(f"{folder} has no .safetensors or .bin weights")
    with tempfile.TemporaryDirectory() as converted:
        paths = paths or convert_bin(bins, Path(converted))
        whole = Renaming(range(len(stack)), len(stack))
        everything = plan_shards(paths, whole, stack_name, {}, [], inside)
        shards = plan_shards(paths, shortened.renaming, stack_name, sliced, tied_names(model), inside)
        if _numel(everything) == _parameters(model) and _numel(shards) != _parameters(shortened.model):
            raise ValueError(
                f"{folder} keeps tensors of its layers under other names than {stack_name}; load the model instead"
            )
        yield shortened, shards, stack_name


def _numel(shards: Sequence[Shard]) -> int:
    return sum(shard.numel for shard in shards)


def _parameters(model: nn.Module) -> int:
    """Elements of a model's checkpoint, each shared tensor counted once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in tensors.values())


def _copy_small_files(folder: Path, target: Path, stack_name: str, renaming: Renaming, others: Sequence[str]) -> None:
    """Take along all but weights and config.json, sub-folders too; quantisation files follow the layers' new names."""
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if not file.is_file() or hidden or _WEIGHTS.search(file.name) or str(inside) == "config.json":
            continue

        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        if _QUANTISATION.search(file.name):
            settings = json.loads(file.read_text())
            write_json(target / inside, renaming.settings(settings, stack_name, others))
        else:
            shutil.copy2(file, target / inside)


def local_folder(source: str | Path) -> Path:
    """The folder of a model; one from the hub is downloaded.

    Raises:
        ValueError: there is no such model.
    """
    source = ordinary_source(source)
    if Path(source).is_dir():
        return Path(source)

    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]))
    except Exception as error:  # the hub client raises errors of many kinds
        raise ValueError(f"cannot open the model {str(source)!r}: {first_line(error)}") from error
