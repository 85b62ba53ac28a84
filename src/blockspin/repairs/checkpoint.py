"""Repairs a shortened checkpoint: from folder to folder, its weights rewritten shard by shard."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from ..files import check_free, replacing, write_json
from ..lock import locked
from ..model.batches import BatchSize
from ..model.blocks import find_stack
from ..model.generation import check_generates
from ..model.largest_batch import lowered_size
from ..model.loading import load_model, local_folder
from ..model.offload import StoredTensor, check_in_memory
from ..model.own_text import own_text
from ..model.probe import agree, probe_logits
from ..model.spill import octets
from ..model.weights import WeightFile, read_headers, tensor_shapes
from ..settings import SPLIT, say
from ..surgery.card import add_repair
from ..surgery.provenance import RECORD
from ..surgery.shards import layer_prefix
from .finished import FinishedBlocks
from .own_share import own_share
from .report import RepairReport
from .run import check_inputs, run_repair

_TOLERANCE = 1e-3  # of the largest logit
_TOLERANCE_HALF = 5e-2  # where the checkpoint has 16 bits


def repair_checkpoint(
    source: str | Path,
    original: str | Path,
    samples: Sequence[Tensor],
    target: str | Path,
    *,
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: BatchSize = "auto",
    seed: int = 0,
    own_text_share: float | None = None,
    trust_remote_code: bool = False,
    data: str | None = None,
    split: str = SPLIT,
    progress: bool = True,
) -> RepairReport:
    """Repair the shortened checkpoint `source` after the model that it was made of, and write it to `target`.

    Shard by shard the changed tensors are replaced, in the dtype in which they are stored; all else is copied, and
    `blockspin.json` tells about the repair. Before the target appears, it is loaded and run. While the repair lasts,
    finished blocks are in `<target>-repair`, from which the same call continues after an interruption. Blocks may stay
    on disk (`device_map="stream"`, see `load_model`): the repair reads them one by one.

    source: a folder that `blockspin prune` wrote. original: a hub id or a folder.
    samples: 1-D int64 tensors of token ids. own_text_share: of all text, what the original writes; None: `own_share`.
    data, split: what `load_calibration` drew the samples from, with this seed; the card then has the command.

    Raises:
        ValueError: the target exists, the source was not shortened by blockspin, or was repaired or trained already,
            the models do not belong together, or as `repair` says.
    """
    source, target = local_folder(source), Path(target)
    check_free(target)
    removed = removed_blocks(source)

    def load(folder: str | Path) -> PreTrainedModel:
        return load_model(folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)

    with locked(target):
        shortened, whole = load(source), load(original)
        say(lowered_size(batch_size, samples, shortened, whole))
        partial = target.with_name(f"{target.name}-repair")

        share, text = own_share(whole, own_text_share), list(samples)
        if share:
            check_inputs(shortened, whole, samples, removed, batch_size, seed)
            text += _written(whole, samples, share, seed, partial / "own_text.jsonl", progress)
        report, finished = run_repair(
            shortened, whole, text, partial, removed=removed, batch_size=batch_size, seed=seed, progress=progress
        )
        with replacing(target) as temporary:
            shutil.copytree(source, temporary, copy_function=shutil.copyfile)
            if not report.undone:
                _write_weights(temporary, shortened, _new_weights(shortened, report, finished))
            about = {"original": str(original), "data": data, "own_tokens": sum(map(len, text[len(samples) :]))}
            settings = _settings(samples, seed, split, share, dtype, trust_remote_code)
            _record(temporary, source, report, {**about, "settings": settings})
            _prove(load(temporary), shortened, _stored_bytes(temporary))
        finished.remove()
    return report


def _settings(
    samples: Sequence[Tensor], seed: int, split: str, own_text_share: float, dtype: str, trust_remote_code: bool
) -> dict[str, str | float | None]:
    """What decides the outcome of a repair besides the models and the data, by option; None: the default."""
    longest = max(map(len, samples))  # to which longer ones were cut, if there were any
    return {
        "split": None if split == SPLIT else split,
        "num_samples": len(samples),
        "max_length": longest,
        "seed": seed,
        "own_text": own_text_share,
        "dtype": None if dtype == "auto" else dtype,
        "trust_remote_code": trust_remote_code,
    }


def _new_weights(model: PreTrainedModel, report: RepairReport, finished: FinishedBlocks) -> dict[str, StoredTensor]:
    """The new tensors of a repaired model, by their names in it."""
    stack = find_stack(model)
    depth = len(stack.layers) + len(report.removed)
    kept = [block for block in range(depth) if block not in report.removed]
    found = {}
    for position, block in enumerate(kept):
        for name, tensor in finished.stored(block).items():
            found[f"{stack.name}.{position}.{name}"] = tensor
    return found


def _written(
    original: PreTrainedModel, samples: Sequence[Tensor], share: float, seed: int, partial: Path, progress: bool
) -> list[Tensor]:
    """Text of the original itself, which becomes this share of all. partial: keeps it.

    Raises:
        ValueError: the original cannot write.
    """
    check_in_memory(original, "text that the original writes itself (--own-text)")
    check_generates(original, "give --own-text 0")

    tokens = math.ceil(share / (1 - share) * sum(map(len, samples)))
    return own_text(original, tokens, max(map(len, samples)), seed, partial=partial, progress=progress)


def removed_blocks(folder: Path) -> list[int]:
    """The blocks that are gone from a checkpoint, as its `blockspin.json` says.

    Raises:
        ValueError: there is none, nothing is gone, or the weights were changed since.
    """
    try:
        about = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no readable {RECORD}, which says what was removed; give a folder that "
            "`blockspin prune` wrote"
        ) from error
    for name, done in (("repair", "repaired"), ("distillation", "trained")):
        if name in about:
            raise ValueError(f"{folder} was {done} already; repair the checkpoint that `blockspin prune` wrote")
    if not about.get("removed") and not about.get("sublayers"):
        raise ValueError(f"nothing was removed from {folder}; there is nothing to repair")
    return list(about["removed"])


def _write_weights(folder: Path, model: PreTrainedModel, changed: Mapping[str, StoredTensor]) -> None:
    """Write new tensors of `model` over the old ones in the weight files of a folder, one at a time."""
    files = read_headers(sorted(folder.glob("*.safetensors")))
    new = _stored_names(files, model, changed)
    for file in files:
        with file.path.open("r+b") as shard:
            for name in file.tensors.keys() & new.keys():
                old, tensor = StoredTensor(file.path, name).load(), new.pop(name).load()
                assert tensor.shape == old.shape, name
                shard.seek(file.start + file.tensors[name]["data_offsets"][0])
                shard.write(octets(tensor.to(old.dtype).contiguous()))
    if new:
        raise ValueError(f"the checkpoint keeps {min(new)} under another name; load the model and use `bs.repair`")


def _stored_names(
    files: Sequence[WeightFile], model: PreTrainedModel, changed: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The changed tensors by their names in the checkpoint, which may call the stack of layers in another way."""
    stack = find_stack(model)
    inside = {name: tuple(tensor.shape) for name, tensor in stack.layers.named_parameters()}
    prefix = layer_prefix(tensor_shapes(files), stack.name, len(stack.layers), inside)
    return {prefix + name.removeprefix(stack.name): tensor for name, tensor in changed.items()}


def _record(folder: Path, source: Path, report: RepairReport, about: Mapping[str, Any]) -> None:
    """Tell about a repair in `blockspin.json` and in the model card.

    source: what was repaired. about: how, besides the report.
    """
    record = json.loads((folder / RECORD).read_text()) | {"repair": {**about, **report.as_json()}}
    write_json(folder / RECORD, record)
    add_repair(folder, str(source), record, report.summary())


def _stored_bytes(folder: Path) -> int:
    """Bytes of an element of the first weight file's first tensor."""
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as shard:
        first: Tensor = shard.get_tensor(next(iter(shard.keys())))
    return first.element_size()


def _prove(written: PreTrainedModel, repaired: PreTrainedModel, stored_bytes: int) -> None:
    """The checkpoint, loaded again, must compute what the repaired model does."""
    tolerance = _TOLERANCE_HALF if stored_bytes < 4 else _TOLERANCE
    same = agree(probe_logits(written), probe_logits(repaired), tolerance)
    assert same, "the written checkpoint computes something else"
