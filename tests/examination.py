"""What is tried on a small model of any type: gates, removals in memory and on disk, saving, loading, decoding."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tiny import DEPTH as LAYERS
from tiny import VOCABULARY, tiny_config, tiny_random_model

from blockspin.errors import first_line
from blockspin.model.blocks import DEPTH, find_blocks
from blockspin.model.gates import gated
from blockspin.model.loading import auto_class
from blockspin.model.tracing import skipped, trace_model
from blockspin.problem import Removal
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.memory import remove_blocks

# Of six blocks: the first, the last, neighbours in the middle, scattered ones; most break a period of two or three.
REMOVALS = ((0,), (5,), (2, 3), (1, 4), (0, 2, 5))

# Of more blocks, in no order: two that are neighbours, and one of the last.
DEEPER = 10
DEEPER_REMOVAL = (4, 5, 7)
_SHUFFLES = 20  # tried until one makes a model; some types allow few orders

Removals = tuple[Removal, ...]


@dataclass
class Row:
    """What happened to one model type: faults are what must not happen, refusals are clear and before any harm."""

    model_type: str
    auto_class: str = ""
    kinds: list[str] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    works: list[Removal] = field(default_factory=list)
    refused: dict[Removal, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    cannot_start: str = ""  # transformers itself cannot build or run it here
    not_a_decoder: str = ""  # refused as a whole
    only_in_memory: str = ""  # why the checkpoint on disk is refused
    has_cache: bool = True  # whether the whole model generates the same with and without its cache
    deeper: str = ""  # what became of ten layers in no order: "works", "not built", or why they are refused


def examine(model_type: str, removals: Removals = REMOVALS) -> Row:
    """Build a small model of this type and try everything on it; a removal that raises something else is a fault."""
    row = Row(model_type)
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))  # (samples, tokens)
    try:
        config = tiny_config(model_type)
        row.auto_class = auto_class(config).__name__
        model = tiny_random_model(config)
    except Exception as error:
        row.cannot_start = first_line(error)
        return row

    try:
        row.kinds = [block.kind for block in find_blocks(model)]
    except ValueError as error:
        row.not_a_decoder = first_line(error)
        return row

    try:
        whole = logits(model, ids)
    except Exception as error:
        row.cannot_start = first_line(error)
        return row

    try:
        row.branches = [trace.branches for trace in trace_model(model).traces]
    except ValueError as error:
        row.not_a_decoder = first_line(error)
        return row

    check_gates(row, model, ids, whole)
    row.has_cache = cache_agrees(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/whole")
        whole_again = reads_back(model, Path(folder) / "whole")
        if not whole_again:
            row.only_in_memory = "transformers does not read back the whole model that it saved"
        check_removals(row, model, removals, ids, Path(folder) if whole_again else None)
    if not torch.equal(logits(model, ids), whole):
        row.faults.append("the model was changed")
    row.deeper = examine_deeper(row, config, ids)
    return row


def examine_deeper(row: Row, config: tf.PreTrainedConfig, ids: torch.Tensor) -> str:
    """Remove three of ten layers whose kinds come in no order; what became of it, faults go into the row."""
    model = None
    for seed in range(_SHUFFLES):
        try:
            model = tiny_random_model(deeper_config(config, seed))
            trace_model(model)
            break
        except Exception:  # not every order makes a model, and classes refuse one in their own ways
            model = None
    if model is None:
        return "not built"

    # The same checks as for six layers. In another order the whole model may fail with its cache.
    found = Row(row.model_type, has_cache=row.has_cache and cache_agrees(model, ids))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/whole")
        on_disk = None if row.only_in_memory else Path(folder)
        check_removals(found, model, (DEEPER_REMOVAL,), ids, on_disk)
    row.faults += [f"{DEEPER} layers: {fault}" for fault in found.faults]
    return found.refused.get(DEEPER_REMOVAL, "works")


def deeper_config(config: tf.PreTrainedConfig, seed: int) -> tf.PreTrainedConfig:
    """A configuration of DEEPER layers: what it says of each layer is repeated and shuffled."""
    values = config.to_dict()
    text = values.get("text_config", values)
    rng = random.Random(seed)
    for name, value in list(text.items()):
        if DEPTH.search(name) and value == LAYERS:
            text[name] = DEEPER
        elif value == [*range(LAYERS)]:  # indices of layers
            text[name] = [*range(DEEPER)]
        elif isinstance(value, list) and len(value) == LAYERS:
            entries = [*value, *value[: DEEPER - LAYERS]]
            rng.shuffle(entries)
            text[name] = entries
    return type(config).from_dict(values)


def reads_back(model: tf.PreTrainedModel, folder: Path) -> bool:
    """Whether transformers itself loads the saved model without missing, unexpected or mismatched tensors."""
    try:
        _, report = auto_class(model.config).from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        print("   read back:", first_line(error), file=sys.stderr)
        return False
    return not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def check_gates(row: Row, model: tf.PreTrainedModel, ids: torch.Tensor, whole: torch.Tensor) -> None:
    """Gates of one change no bit; a gate of zero makes each layer the identity on its hidden states."""
    traced = trace_model(model)
    with guard(row, "gates"):
        with gated(traced, torch.ones(2, traced.depth)):
            if not torch.equal(logits(model, ids), whole):
                row.faults.append("gates of one change the logits")

        for i, layer in enumerate(traced.layers):
            alphas = torch.ones(2, traced.depth)  # (samples, blocks)
            alphas[:, i] = 0
            with noted(layer) as passes:
                logits(model, ids)
                with gated(traced, alphas):
                    logits(model, ids)
            if not passes:  # a block that attends to images rests on text
                continue

            (_, ungated), (entered, left) = passes
            if not torch.allclose(entered, left, rtol=0, atol=1e-6 * float(ungated.abs().max())):
                row.faults.append(f"a gate of zero does not make layer {i} the identity")


@contextlib.contextmanager
def noted(layer: torch.nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The hidden states that enter and leave a layer, pass by pass."""
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        left = output[0] if isinstance(output, tuple | list) else output
        passes.append((entered, left))

    handle = layer.register_forward_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def check_removals(
    row: Row, model: tf.PreTrainedModel, removals: Removals, ids: torch.Tensor, folder: Path | None
) -> None:
    """Each removal works in memory and, where there is a folder, on disk, or is refused."""
    for removed in removals:
        with guard(row, f"{removed}"):
            try:
                smaller = remove_blocks(model, removed)
            except ValueError as error:
                row.refused[removed] = first_line(error)
                continue

            check_memory(row, model, smaller, removed, ids)
            if row.has_cache and not cache_agrees(smaller, ids):
                row.faults.append(f"{removed}: what is decoded with the cache differs")
            if folder is not None:
                check_saved(row, smaller, removed, ids, folder)
                check_disk(row, smaller, removed, ids, folder)
            row.works.append(removed)


def check_memory(
    row: Row, model: tf.PreTrainedModel, smaller: tf.PreTrainedModel, removed: Removal, ids: torch.Tensor
) -> None:
    """Gates of zero, skipping and removal agree."""
    traced = trace_model(model)
    expected = logits(smaller, ids)

    alphas = torch.ones(2, traced.depth)  # (samples, blocks)
    alphas[:, list(removed)] = 0
    with gated(traced, alphas):
        by_gates = logits(model, ids)
    with skipped(traced, removed):
        by_skipping = logits(model, ids)

    for name, found in (("gates", by_gates), ("skipping", by_skipping)):
        if not close(found, expected):
            row.faults.append(f"{removed}: {name} and removal differ by {difference(found, expected)}")
    if close(logits(model, ids), expected):
        row.faults.append(f"{removed}: the removal changes nothing")


def check_saved(row: Row, smaller: tf.PreTrainedModel, removed: Removal, ids: torch.Tensor, folder: Path) -> None:
    """What was shortened in memory is saved and loaded like any model."""
    shutil.rmtree(folder / "saved", ignore_errors=True)
    smaller.save_pretrained(folder / "saved")
    loaded, report = auto_class(smaller.config).from_pretrained(folder / "saved", output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        row.faults.append(f"{removed}: saved from memory, from_pretrained reports {report}")
    found, expected = logits(loaded.eval(), ids), logits(smaller, ids)
    if not close(found, expected):
        row.faults.append(f"{removed}: saved from memory it differs by {difference(found, expected)}")


def check_disk(row: Row, smaller: tf.PreTrainedModel, removed: Removal, ids: torch.Tensor, folder: Path) -> None:
    """What comes back from the shortened folder is the model shortened in memory, to the last bit of its cache."""
    shutil.rmtree(folder / "short", ignore_errors=True)
    try:
        prune_checkpoint(folder / "whole", removed, folder / "short", progress=False)
    except ValueError as error:
        row.only_in_memory = first_line(error).replace(f"{folder}/", "")
        return

    loaded, report = auto_class(smaller.config).from_pretrained(folder / "short", output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        row.faults.append(f"{removed}: from_pretrained reports {report}")
    found, expected = logits(loaded.eval(), ids), logits(smaller, ids)
    if not close(found, expected):
        row.faults.append(f"{removed}: disk and memory differ by {difference(found, expected)}")
    if row.has_cache and not close(decoded(loaded, ids)[1], decoded(smaller, ids)[1]):
        row.faults.append(f"{removed}: what is decoded with the cache differs after loading")


def logits(model: tf.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """(samples, tokens, vocabulary)"""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"{float((a - b).abs().max() / b.abs().max()):.2g}"


def decoded(model: tf.PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Six tokens decoded greedily with the cache: all tokens (samples, tokens + 6), logits (samples, 6, vocabulary)."""
    found = model.generate(
        ids,
        min_new_tokens=6,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, torch.stack(found.logits, dim=1)


def cache_agrees(model: tf.PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether each step with the cache gives the logits of one pass without; False where nothing can be generated."""
    try:
        tokens, with_cache = decoded(model, ids)
        return close(with_cache, logits(model, tokens)[:, ids.shape[1] - 1 : -1])
    except Exception as error:
        print("   generate:", first_line(error), file=sys.stderr)
        return False


@contextlib.contextmanager
def guard(row: Row, what: str) -> Iterator[None]:
    """Anything raised inside is a fault."""
    try:
        yield
    except Exception as error:
        row.faults.append(f"{what}: {type(error).__name__}: {first_line(error)}")


def quiet_examine(model_type: str) -> Row:
    warnings.filterwarnings("ignore")
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return examine(model_type)
