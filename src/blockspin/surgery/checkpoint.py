"""Removes blocks from a checkpoint on disk, without loading it."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from ..files import check_free, is_taken, replacing, write_json
from ..lock import locked
from ..model.blocks import count_parameters, find_stack
from ..model.loading import load_config, local_folder, model_without_weights
from ..model.weights import (
    LoadingReport,
    WeightFile,
    check_complete,
    convert_bin,
    read_headers,
    report_loading,
    tensor_shapes,
    weight_paths,
)
from ..problem import Removal, Units
from ..progress import console
from .absent import lacks_modules
from .card import CARD, write_card
from .layer_config import Shortened, shorten_config
from .patterns import ModuleSettings, module_settings
from .proof import split_blocks, tied_names
from .provenance import RECORD, record_removal, tells_of
from .shards import Shard, plan_shards, write_shards

_WEIGHTS = {
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".npz", ".npy", ".pkl", ".pickle", ".ot", ".tflite", ".mlmodel", ".pdparams", ".nemo", ".distcp"),
}
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
    was removed from what, also in numbers of the original where the source was shortened before. PyTorch `.bin`
    weights become safetensors. The target appears when it is whole; the same call again leaves it as it is.

    Only the weights that transformers would load are read: one file, or the shards that the index names. Others in the
    folder (of an adapter, an older save, another format) are left behind, and a message says which. Before anything is
    written transformers has to find a tensor for every parameter, of the original and of the shortened model.

    source: a hub id or a folder with safetensors (or .bin) weights.
    details: added to `blockspin.json`.

    Raises:
        ValueError: the source is unusable (weights are missing, broken or do not belong to the configuration), the
            target exists and is something else, the removal cannot be expressed, or the disk is full.
    """
    target, folder, removed = Path(target), local_folder(source), list(removed)
    if is_done(target, folder, source, removed):
        return

    with locked(target), _planned(folder, removed, trust_remote_code) as plan, replacing(target) as temporary:
        # Everything that can be refused is refused before the first byte is written.
        shortened, kept = plan.shortened, plan.shortened.renaming.kept
        record = record_removal(folder, source, plan.removed, kept, plan.left_behind, details or {})
        temporary.mkdir()
        copy_small_files(folder, temporary, plan.module_settings)
        settings = dict(shortened.values)
        settings.pop("transformers_weights", None)  # names the file that was read; the new ones have the usual names
        write_json(temporary / "config.json", settings)
        write_shards(plan.shards, temporary, progress)
        write_json(temporary / RECORD, record)
        write_card(temporary, record, count_parameters(shortened.model), folder / CARD)

    if progress and plan.left_behind:
        console.print(
            f"Left behind, because transformers does not load them: {', '.join(plan.left_behind)}.",
            highlight=False,
            soft_wrap=True,
        )
    if progress and _changes_order(load_config(folder, trust_remote_code=trust_remote_code), kept):
        console.print(
            "Layers with and without a sliding window follow one another in another order now. transformers reads it "
            "from the configuration; before use in vLLM or llama.cpp see docs/loading_elsewhere.md."
        )


def is_done(target: Path, folder: Path, source: str | Path, removed: Sequence[int], units: Units = "blocks") -> bool:
    """Whether the target holds what this removal makes already.

    Raises:
        ValueError: it exists and is something else.
    """
    if is_taken(target) and tells_of(target, folder, source, removed, units):
        return True
    check_free(target)
    return False


def refuse_adapter(folder: Path) -> None:
    """Raise ValueError where a folder holds an adapter, and not a model."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), and transformers would load the model that it is for; "
            "merge the adapter into that model and save the result first"
        )


def _changes_order(config: PretrainedConfig, kept: Sequence[int]) -> bool:
    """Whether some position has a layer of another attention or rotation than before, which some runtimes overlook."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    has_windows = any(re.match("sliding|chunked", str(kind)) for kind in kinds)
    rotated = getattr(text, "no_rope_layers", None) or []

    # A runtime that assumes the usual order of the model type goes wrong where a position differs.
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
    with _planned(local_folder(source), removed, trust_remote_code) as plan:
        return sum(shard.size for shard in plan.shards)


@dataclass(frozen=True)
class _Plan:
    """What to write: a proven configuration, and what to copy of the weights.

    removed: the indices, checked. module_settings: rewrites quantisation settings.
    left_behind: weights in the folder that are not read.
    """

    removed: Removal
    shortened: Shortened
    shards: list[Shard]
    module_settings: ModuleSettings
    left_behind: list[str]


@contextmanager
def _planned(folder: Path, removed: Iterable[int], trust_remote_code: bool) -> Iterator[_Plan]:
    """The plan of a removal. While it is open, .bin weights lie converted in a temporary folder."""
    refuse_adapter(folder)
    config, removed = load_config(folder, trust_remote_code=trust_remote_code), list(removed)
    if removed and lacks_modules(config):
        raise ValueError(
            f"{folder} lacks sub-layers, so its layers are not alike; remove the sub-layers of its blocks instead "
            "(--units sublayers)"
        )

    def build(config: PretrainedConfig) -> PreTrainedModel:
        return model_without_weights(config, trust_remote_code=trust_remote_code)

    model = build(config)
    removed, kept = split_blocks(model, removed)
    shortened = shorten_config(config, kept, build, json.loads((folder / "config.json").read_text()))

    paths = weight_paths(folder)
    left_behind = _left_behind(folder, paths)
    with tempfile.TemporaryDirectory() as converted:
        if paths[0].suffix == ".bin":
            paths = convert_bin(paths, Path(converted))
        files = read_headers(paths)

        # transformers decides, before and after, whether every tensor of the model gets its weights.
        before = report_loading(model, tensor_shapes(files), folder)
        check_complete(before, model, folder)

        shards = _plan_shards(files, model, shortened)
        _check_plan(shards, shortened, before, folder)
        yield _Plan(removed, shortened, shards, module_settings(model, shortened.renaming), left_behind)


def _plan_shards(files: Sequence[WeightFile], model: PreTrainedModel, shortened: Shortened) -> list[Shard]:
    """What to copy of the weights of a model."""
    stack_name = find_stack(model).name
    inside = {}  # shapes of the tensors of the layers, by their names inside the stack
    sliced = {}  # tensors outside the layers with a slice for each: the dimension, and the shape
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        if name.startswith(f"{stack_name}."):
            inside[name.removeprefix(f"{stack_name}.")] = tensor.shape
        if name in shortened.slices:
            sliced[name] = (shortened.slices[name], tuple(tensor.shape))
    return plan_shards(files, shortened.renaming, stack_name, sliced, tied_names(model), inside)


def _check_plan(shards: Sequence[Shard], shortened: Shortened, before: LoadingReport, folder: Path) -> None:
    """Raise ValueError unless what is to be written gives every tensor of the shortened model its weights, and has no
    more that it does not take than the whole checkpoint has."""
    shapes = {}
    for shard in shards:
        for entry in shard.entries:
            shapes[entry.name] = entry.header["shape"]
    after = report_loading(shortened.model, shapes, folder)

    # Tensors that the model does not take (for multi-token prediction, ...) may be in both.
    if after.missing or after.mismatched or len(after.unexpected) > len(before.unexpected):
        faults = [*after.missing, *after.mismatched, *sorted({*after.unexpected} - {*before.unexpected})]
        raise ValueError(
            f"{folder} keeps tensors of its layers in a form that cannot be shortened on disk (such as {faults[0]}); "
            "load the model instead"
        )


def copy_small_files(folder: Path, target: Path, module_settings: ModuleSettings) -> None:
    """Take along all but weights and config.json, sub-folders too; quantisation files follow the layers' new names."""
    for file in _other_files(folder):
        if _holds_weights(file):
            continue
        inside = file.relative_to(folder)
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        if _QUANTISATION.search(file.name):
            write_json(target / inside, module_settings.rewritten(json.loads(file.read_text())))
        else:
            shutil.copy2(file, target / inside)


def small_files_bytes(source: str | Path) -> int:
    """Bytes of what a shortened checkpoint takes along besides the weights: the tokenizer, most of all."""
    files = _other_files(local_folder(source))
    return sum(file.stat().st_size for file in files if not _holds_weights(file))


def _other_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and below, but for hidden ones, config.json, blockspin.json and the model card."""
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if file.is_file() and not hidden and str(inside) not in ("config.json", RECORD, CARD):
            yield file


def _holds_weights(file: Path) -> bool:
    return file.suffix in _WEIGHTS or file.name.endswith(".index.json")


def _left_behind(folder: Path, read: Sequence[Path]) -> list[str]:
    """Weights in a folder that belong to no part of the model, by their path inside it."""
    indices = [folder / name for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")]
    left = []
    for file in _other_files(folder):
        if _holds_weights(file) and file not in [*read, *indices]:
            left.append(str(file.relative_to(folder)))
    return left
