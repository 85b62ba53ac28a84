"""Removes sub-layers from a checkpoint: the model is loaded, shortened, saved, and loaded again to prove it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..files import replacing, write_json
from ..lock import locked
from ..model.blocks import count_parameters
from ..model.loading import load_config, load_model, local_folder
from ..model.placement import dtype_of
from ..model.probe import agree, probe_logits
from ..model.tracing import TracedModel, trace_model
from ..model.weights import silenced
from ..problem import Block, block_of
from ..progress import console
from .absent import lacks_modules
from .card import CARD, write_card
from .checkpoint import copy_small_files, is_done, prune_checkpoint, refuse_adapter
from .memory import check_sublayers, remove_blocks
from .patterns import module_settings
from .provenance import RECORD, read_record, record_removal
from .renaming import Renaming

_SHARD = "5GB"  # the largest file of weights
_TOLERANCE = 1e-3  # of the largest logit
_CONVERTED_ROTATIONS = ("default", "llama3")  # what llama.cpp's converter of DeciLM writes


def prune_sublayers(
    source: str | Path,
    removed: Iterable[int],
    target: str | Path,
    *,
    details: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint without the removed sub-layers.

    Where only whole blocks go, that is `prune_checkpoint`. Otherwise the checkpoint has a modelling file of its own and
    loads with trust_remote_code; a Llama without biases whose first layer keeps its attention is DeciLM besides, which
    vLLM and llama.cpp know. The model is loaded on the CPU, and once more from what was written: it must compute the
    same. The target appears when that is proven; the same call again leaves it as it is.

    source: a hub id or a folder; it may lack sub-layers already. removed: numbers of sub-layers, as `find_units` counts
        those that are left.
    details: added to `blockspin.json`.

    Raises:
        ValueError: the source is unusable, the target exists and is something else, or the removal cannot be expressed.
    """
    target, folder, removed = Path(target), local_folder(source), list(removed)
    if is_done(target, folder, source, removed, "sublayers"):
        return
    refuse_adapter(folder)
    model = load_model(folder, dtype="auto", trust_remote_code=trust_remote_code)
    traced = trace_model(model, "sublayers")
    removed = list(check_sublayers(traced, removed))
    whole, partial = traced.whole_and_partial(removed)
    gone = _described(traced, removed, read_record(folder))
    about = {**(details or {}), "sublayers": removed, "gone": gone}
    if not partial and not lacks_modules(model.config):
        prune_checkpoint(source, whole, target, details=about, trust_remote_code=trust_remote_code, progress=progress)
        return

    smaller = remove_blocks(model, removed, units="sublayers", copy=False)
    if progress:
        console.print(_where_it_runs(smaller, [traced.units[i] for i in removed]), highlight=False, soft_wrap=True)
    kept = [i for i in range(traced.depth) if i not in whole]
    expected = probe_logits(smaller)
    _as_stored(smaller, dtype_of(load_config(folder, trust_remote_code=trust_remote_code), "auto"))
    with locked(target), replacing(target) as temporary:
        temporary.mkdir()
        copy_small_files(folder, temporary, module_settings(model, Renaming(kept, traced.depth)))
        with silenced():  # with its modelling file, which may be another
            smaller.save_pretrained(temporary, max_shard_size=_SHARD)
        record = record_removal(folder, source, tuple(whole), kept, [], about)
        write_json(temporary / RECORD, record)
        write_card(temporary, record, count_parameters(smaller), folder / CARD)
        _prove(temporary, expected)


def _described(traced: TracedModel, removed: Iterable[int], before: Mapping[str, Any] | None) -> list[str]:
    """What is gone since the original, for people: "attention of block 3". before: the record of earlier removals."""
    found: list[str] = []
    blocks: Sequence[int] = range(traced.depth)  # of the original
    if before is not None:
        original = before.get("original", before)
        blocks = original["kept"]
        found += before.get("gone") or [f"block {block}" for block in original["removed"]]

    for number in removed:
        unit = traced.units[number]
        found.append(f"{unit.kind} of block {blocks[block_of(unit)]}")
    return found


def _as_stored(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give parameters the dtype of the checkpoint again, which on a CPU are loaded as float32; none loses a bit."""
    for parameter in model.parameters():
        narrow = parameter.detach().to(dtype)
        if torch.equal(narrow.to(parameter.dtype), parameter):
            parameter.data = narrow


def _prove(folder: Path, expected: Tensor) -> None:
    """Raise ValueError unless the model that is loaded from a folder gives these logits, as `probe_logits` does."""
    loaded = load_model(folder, dtype="auto", trust_remote_code=True)
    if not agree(probe_logits(loaded), expected, _TOLERANCE):
        raise ValueError(
            f"{type(loaded).__name__}, written and loaded again, computes something else; use the model in memory "
            "(`remove_blocks`), or remove whole blocks (--units blocks)"
        )


def _where_it_runs(smaller: PreTrainedModel, gone: list[Block]) -> str:
    """Which runtimes open the checkpoint, and what is silently wrong there."""
    text = "transformers opens it with trust_remote_code=True."
    if not hasattr(smaller.config, "block_configs"):
        return text + " vLLM and llama.cpp do not open it: they know no such model."
    text += " vLLM opens it as DeciLM, with --trust-remote-code."

    lost = []
    if any(unit.kind == "mlp" for unit in gone):
        lost.append("the attention of layers that have no MLP")
    if smaller.config.rope_parameters["rope_type"] not in _CONVERTED_ROTATIONS:
        lost.append("the scaling of the rotations")
    if not lost:
        return text + " llama.cpp opens it, converted; see docs/loading_elsewhere.md."
    return (
        f"{text} llama.cpp loses {' and '.join(lost)} without a word where its own converter made the file: "
        "make it with scripts/sublayers_to_gguf.py."
    )
