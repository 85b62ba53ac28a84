"""Repairs a shortened checkpoint: from folder to folder, its weights rewritten shard by shard."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..files import replacing, write_json
from ..lock import locked
from ..model.batches import BatchSize, frozen, input_device
from ..model.blocks import find_stack
from ..model.loading import load_model, local_folder
from ..progress import console
from ..surgery.card import add_repair
from ..surgery.shards import layer_prefix
from .own_text import own_text
from .report import RepairReport
from .run import repair

_PROVENANCE = "blockspin.json"
_CHECKED_TOKENS = [[1, 2, 3, 4, 5, 6]]  # (1, 6): any will do
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
    own_text_share: float = 0.0,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> RepairReport:
    """Repair the shortened checkpoint `source` after the model that it was made of, and write it to `target`.

    Shard by shard the changed tensors are replaced, in the dtype in which they are stored; all else is copied, and
    `blockspin.json` tells about the repair. Before the target appears, it is loaded and run. While the repair lasts,
    finished blocks are in `<target>-repair`, from which the same call continues after an interruption.

    source: a folder that `blockspin prune` wrote. original: a hub id or a folder.
    samples: 1-D int64 tensors of token ids. own_text_share: how much of the text is written by the original itself, on
    top of the samples; it is of all the kinds that the original knows.

    Raises:
        ValueError: the target exists, the source was not shortened by blockspin, or was repaired or trained already,
            the models do not belong together, or as `repair` says.
    """
    source, target = local_folder(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose another place (--out) or remove it")
    removed = removed_blocks(source)

    def load(folder: str | Path) -> PreTrainedModel:
        return load_model(folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code)

    with locked(target):
        shortened = load(source)
        old, whole = dict(shortened.named_parameters()), load(original)
        written = _written(whole, samples, own_text_share, seed)
        report = repair(
            shortened,
            whole,
            [*samples, *written],
            removed=removed,
            batch_size=batch_size,
            seed=seed,
            partial=target.with_name(f"{target.name}-repair"),
            progress=progress,
        )
        changed = {name: p.detach() for name, p in shortened.named_parameters() if p is not old[name]}

        with replacing(target) as temporary:
            shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("*.safetensors"))
            _write_weights(source, temporary, shortened, changed)
            _record(temporary, report, original, own_tokens=sum(map(len, written)))
            _prove(load(temporary), shortened, _stored_bytes(temporary))
    return report


def _written(original: PreTrainedModel, samples: Sequence[Tensor], share: float, seed: int) -> list[Tensor]:
    """Text of the original itself, which becomes this share of all."""
    if share == 0:
        return []
    tokens = math.ceil(share / (1 - share) * sum(map(len, samples)))
    with console.status(f"Writing {tokens:,} tokens of text"):
        return own_text(original, tokens, max(map(len, samples)), seed)


def removed_blocks(folder: Path) -> list[int]:
    """The blocks that are gone from a checkpoint, as its `blockspin.json` says.

    Raises:
        ValueError: there is none, nothing is gone, or the weights were changed since.
    """
    try:
        about = json.loads((folder / _PROVENANCE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no readable {_PROVENANCE}, which says what was removed; give a folder that "
            "`blockspin prune` wrote"
        ) from error
    for name, done in (("repair", "repaired"), ("distillation", "trained")):
        if name in about:
            raise ValueError(f"{folder} was {done} already; repair the checkpoint that `blockspin prune` wrote")
    if not about.get("removed") and not about.get("sublayers"):
        raise ValueError(f"nothing was removed from {folder}; there is nothing to repair")
    return list(about["removed"])


def _write_weights(source: Path, target: Path, model: PreTrainedModel, changed: Mapping[str, Tensor]) -> None:
    """Copy the weight files of `source`, with the changed tensors of `model` in them."""
    files = sorted(source.glob("*.safetensors"))
    new = _stored_names(files, model, changed)
    missing = set(new)
    for file in files:
        with safe_open(file, framework="pt") as shard:
            tensors: dict[str, Tensor] = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            metadata = shard.metadata()
        for name in tensors.keys() & new.keys():
            assert tensors[name].shape == new[name].shape, name
            tensors[name] = new[name].to("cpu", tensors[name].dtype).contiguous()
        missing -= tensors.keys()
        save_file(tensors, target / file.name, metadata=metadata)
    if missing:
        raise ValueError(f"{source} keeps {sorted(missing)[0]} under another name; load the model and use `bs.repair`")


def _stored_names(files: Sequence[Path], model: PreTrainedModel, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changed tensors by their names in the checkpoint, which may call the stack of layers in another way."""
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                shapes[name] = shard.get_slice(name).get_shape()
    stack = find_stack(model)
    inside = {name: tuple(tensor.shape) for name, tensor in stack.layers.named_parameters()}
    prefix = layer_prefix(shapes, stack.name, len(stack.layers), inside)
    return {prefix + name.removeprefix(stack.name): tensor for name, tensor in changed.items()}


def _record(folder: Path, report: RepairReport, original: str | Path, own_tokens: int) -> None:
    """Tell about a repair in `blockspin.json` and in the model card. own_tokens: how many the original has written."""
    about = json.loads((folder / _PROVENANCE).read_text())
    repair_entry = {"original": str(original), "own_tokens": own_tokens, **report.as_json()}
    write_json(folder / _PROVENANCE, about | {"repair": repair_entry})
    add_repair(folder, report.summary())


def _stored_bytes(folder: Path) -> int:
    """Bytes of an element of the first weight file's first tensor."""
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as shard:
        first: Tensor = shard.get_tensor(next(iter(shard.keys())))
    return first.element_size()


def _prove(written: PreTrainedModel, repaired: PreTrainedModel, stored_bytes: int) -> None:
    """The checkpoint, loaded again, must compute what the repaired model does."""
    logits = []
    for model in (written, repaired):
        with frozen(model), torch.no_grad():
            token_ids = torch.tensor(_CHECKED_TOKENS, device=input_device(model))
            logits.append(model(input_ids=token_ids, use_cache=False).logits.float().cpu())  # (1, tokens, vocabulary)
    tolerance = (_TOLERANCE_HALF if stored_bytes < 4 else _TOLERANCE) * float(logits[1].abs().max())
    assert torch.allclose(logits[0], logits[1], rtol=0, atol=tolerance), (
        "the written checkpoint computes something else"
    )
