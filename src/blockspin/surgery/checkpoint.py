"""Removes blocks: from a model in memory, and from a checkpoint on disk without loading it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .. import __version__
from ..errors import first_line
from ..files import replacing, write_json
from ..model.batches import frozen, input_device
from ..model.blocks import check_images, check_removal, find_blocks, find_stack, other_lists
from ..model.loading import load_config, model_without_weights
from ..model.tracing import closed, trace_model
from ..progress import console
from .layer_config import Shortened, shorten_config
from .proof import tied_names
from .renaming import Renaming
from .shards import Shard, convert_bin, plan_shards, write_shards

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|h5|msgpack|gguf|onnx)$|\.index\.json$")


def remove_blocks(model: nn.Module, removed: Iterable[int]) -> PreTrainedModel:
    """An ordinary transformers model without the removed blocks. It shares its weights with `model`, which stays whole.

    A few tokens are run through both to prove that the result is `model` with the removed blocks' gates at zero.

    Raises:
        ValueError: unusable block indices, or a removal that the model or its configuration does not allow.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers model; unwrap it first (merge adapters, ...)")
    name, stack = find_stack(model)
    removed = check_removal(removed, len(stack))
    kept = [i for i in range(len(stack)) if i not in removed]
    check_attention(model, kept)
    check_images(model, removed)
    shortened = shorten_config(model.config, kept, lambda config: _like(model, config))
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    smaller: PreTrainedModel = copy.deepcopy(model, tensors)
    left = nn.ModuleList(find_stack(smaller)[1][i] for i in kept)
    _cut_slots(left, shortened.renaming)
    smaller.set_submodule(name, left)
    _adopt(smaller, shortened)
    if next(model.parameters()).device.type != "meta":
        _check_logits(model, smaller, removed)
    return smaller


def _like(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """A model of the same class without weights."""
    with torch.device("meta"):
        built: PreTrainedModel = type(model)._from_config(copy.deepcopy(config))
    return built


def check_attention(model: nn.Module, kept: Sequence[int]) -> None:
    """The cache of a hybrid model counts tokens in its attention layers: the last of them must stay."""
    kinds = [set(block.kind.split("+")) for block in find_blocks(model)]
    attending = [i for i, kind in enumerate(kinds) if "attention" in kind]
    if attending and not any(i in kept for i in attending):
        raise ValueError(f"the removal leaves no attention block; keep at least one of {attending}")


def _cut_slots(stack: nn.ModuleList, renaming: Renaming) -> None:
    """Drop the entries of removed layers from lists inside the layers."""
    lists = [
        (layer, name, module) for layer in stack for name, module in layer.named_modules() if name in renaming.slots
    ]
    for layer, name, module in lists:
        left = [entry for entry, new in zip(module, renaming.slots[name], strict=True) if new is not None]
        layer.set_submodule(name, nn.ModuleList(left))


def _adopt(smaller: PreTrainedModel, shortened: Shortened) -> None:
    """Take the configurations, numbers and tables (layer indices, depths) of the model built from the shortened
    configuration, and cut the tensors that hold a slice for each layer."""
    twins = dict(shortened.model.named_modules())
    for name, module in smaller.named_modules():
        for key, value in vars(twins[name]).items() if name in twins else ():
            if key.startswith("_"):
                continue
            if isinstance(value, PretrainedConfig) or (_is_plain(value) and not isinstance(value, bool | str | None)):
                setattr(module, key, value)
    for name, dimension in shortened.slices.items():
        owner, _, leaf = name.rpartition(".")
        module = smaller.get_submodule(owner)
        whole = getattr(module, leaf)
        cut = (
            whole.detach()
            .unflatten(dimension, (shortened.renaming.depth, -1))
            .index_select(dimension, torch.tensor(shortened.renaming.kept, device=whole.device))
        )
        cut = cut.flatten(dimension, dimension + 1)
        setattr(module, leaf, nn.Parameter(cut, whole.requires_grad) if isinstance(whole, nn.Parameter) else cut)


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and text only."""
    if isinstance(value, dict):
        return all(_is_plain(entry) for entry in [*value, *value.values()])
    return (
        all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, int | float | str | None)
    )


def _check_logits(model: nn.Module, smaller: nn.Module, removed: Sequence[int]) -> None:
    """Raise ValueError unless the shorter model computes what `model` does with the removed blocks' gates at zero."""
    traced = trace_model(model)
    token_ids = torch.tensor([[1, 2, 3, 4, 5, 6]], device=input_device(model))
    with frozen(model), frozen(smaller), torch.no_grad():
        found: Tensor = smaller(input_ids=token_ids, use_cache=False).logits.float()
        with closed(traced, removed):
            expected: Tensor = model(input_ids=token_ids, use_cache=False).logits.float()
    dtype = next(model.parameters()).dtype
    tolerance = 1e-2 if dtype.itemsize < 4 else 1e-3
    if not torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()), equal_nan=True):
        raise ValueError(
            f"without the blocks {list(removed)} the other blocks of {type(model).__name__} compute something else: "
            "they use more of the removed blocks than the residual stream; choose other blocks"
        )


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
        write_json(
            temporary / "blockspin.json",
            {
                "source": str(source),
                "removed": removed,
                "kept": list(shortened.renaming.kept),
                "blockspin": __version__,
                "transformers": transformers.__version__,
                **(details or {}),
            },
        )
    if progress and _changes_order(load_config(folder, trust_remote_code=trust_remote_code), shortened.renaming.kept):
        console.print(
            "Layers with and without a sliding window follow one another in another order now. transformers reads it "
            "from the configuration; before use in vLLM or llama.cpp see docs/loading_elsewhere.md."
        )


def _changes_order(config: PretrainedConfig, kept: Sequence[int]) -> bool:
    """Whether some position has a layer of another attention or rotation than before, which some runtimes overlook."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    windows = kinds if any(re.match("sliding|chunked", str(kind)) for kind in kinds) else []
    lists = [windows, getattr(text, "no_rope_layers", None) or []]
    return any(values[i] != values[p] for values in lists for p, i in enumerate(kept) if i < len(values))


def checkpoint_bytes(source: str | Path, removed: Iterable[int] = (), *, trust_remote_code: bool = False) -> int:
    """Bytes of the weights on disk that the checkpoint would have without the removed blocks.

    Raises:
        ValueError: the source has no usable weights, or the removal cannot be expressed.
    """
    with _planned(local_folder(source), removed, trust_remote_code) as (_, shards, _):
        return sum(entry.size for shard in shards for entry in shard.entries)


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
    inside = {n.removeprefix(f"{stack_name}."): t.shape for n, t in tensors.items() if n.startswith(f"{stack_name}.")}
    sliced = {name: (dimension, tuple(tensors[name].shape)) for name, dimension in shortened.slices.items()}
    paths, bins = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not paths and not bins:
        raise ValueError(f"{folder} has no .safetensors or .bin weights")
    with tempfile.TemporaryDirectory() as converted:
        paths = paths or convert_bin(bins, Path(converted))
        everything = plan_shards(paths, Renaming(range(len(stack)), len(stack)), stack_name, {}, [], inside)
        shards = plan_shards(paths, shortened.renaming, stack_name, sliced, tied_names(model), inside)
        if _numel(everything) == _parameters(model) and _numel(shards) != _parameters(shortened.model):
            raise ValueError(
                f"{folder} keeps tensors of its layers under other names than {stack_name}; load the model instead"
            )
        yield shortened, shards, stack_name


def _numel(shards: Sequence[Shard]) -> int:
    return sum(entry.numel for shard in shards for entry in shard.entries)


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
        if re.search(r"quant\w*\.json$", file.name):
            write_json(target / inside, renaming.settings(json.loads(file.read_text()), stack_name, others))
        else:
            shutil.copy2(file, target / inside)


def local_folder(source: str | Path) -> Path:
    """The folder of a model; one from the hub is downloaded.

    Raises:
        ValueError: there is no such model.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]))
    except Exception as error:  # the hub client raises errors of many kinds
        raise ValueError(f"cannot open the model {str(source)!r}: {first_line(error)}") from error
