"""The end of a selection: its best removals are compared as a repair leaves them, which may change their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import ChoosingSettings
from ..journal import Journal
from ..model import fingerprint
from ..model.blocks import count_parameters, find_stack
from ..model.offload import is_offloaded
from ..model.quality import quality_of
from ..model.quantization import is_quantized
from ..problem import Removal, Units
from ..processes import gathered, share
from ..progress import console, track
from ..repairs.fitting import Text
from ..repairs.run import least_tokens, repair
from ..solvers.candidates import Candidate
from ..surgery.feasible import Removable
from ..surgery.memory import remove_blocks
from .result import Selection, Trial

FINALISTS = 4
_ENOUGH = 3  # times the tokens that a repair needs at least are fitted to


def choose_repaired(
    model: nn.Module,
    selection: Selection,
    samples: Sequence[Tensor],
    repair_samples: Sequence[Tensor],
    removable: Removable,
    settings: ChoosingSettings,
    *,
    partial: Path | None = None,
    progress: bool = True,
) -> Selection:
    """The selection with the best of its last removals after a repair as its choice.

    Each of the few best removals that were measured on all samples is built in memory, repaired with a part of
    `repair_samples`, and measured on `samples`, which the repair does not see. The trials keep what they have plain,
    and tell what they have repaired. Where there is too little text for a repair, the model's blocks stay on disk or
    its weights are quantised, the selection stays as it is, and that is said.

    selection: its objective is "kl" or "loss". settings: their seed and size of batches are read.
    partial: a file that keeps what was measured, so that the same call continues.

    Raises:
        ValueError: a hidden state is not finite, or a partial file is of another selection.
    """
    text = _text_to_fit(model, repair_samples, settings.seed)
    if not text:
        return selection

    last = finalists(selection, removable)
    identity = fingerprint.of_results(model, [*samples, *text], selection.objective, settings.seed)
    journal = Journal(partial, identity)
    known: dict[Removal, dict[str, Any]] = {tuple(entry["removed"]): entry for entry in journal.entries()}

    # Several processes share the removals.
    missing = [trial for trial in last if trial.removed not in known]
    done, own = len(last) - len(missing), share(missing)
    found = gathered(
        _measured(model, trial, removable.units, selection.objective, samples, text, settings) for trial in own
    )
    entries = track(found, "Repairing the last candidates", len(last), done, show=progress)
    for trial, entry in zip(missing, entries, strict=True):
        known[trial.removed] = entry
        journal.append(entry)

    return _with_repaired(selection, last, known)


def _with_repaired(
    selection: Selection, last: Sequence[Trial], known: Mapping[Removal, Mapping[str, Any]]
) -> Selection:
    """The selection with the best of the last trials as its choice, and what was measured after repairs beside it.

    known: the entry of the journal for each of the last trials.
    """
    trials = []
    for trial in selection.trials:
        of_trial = known.get(trial.removed)
        trials.append(trial if of_trial is None else replace(trial, repaired=of_trial["value"]))

    best = min(last, key=lambda trial: (known[trial.removed]["value"], trial.loss))
    return replace(
        selection,
        chosen=Candidate(best.removed, best.source, best.energy, best.loss),
        trials=tuple(trials),
        repair_passes=sum(entry["passes"] for entry in known.values()),
        seconds=selection.seconds + sum(entry["seconds"] for entry in known.values()),
    )


def repaired_beside(partial: Path) -> Path:
    """The file of what was measured after a repair, beside that of the race."""
    return partial.with_name(f"{partial.stem}.repaired.jsonl")


def finalists(selection: Selection, removable: Callable[[Removal], bool]) -> list[Trial]:
    """The choice, and of the trials on all samples the best few that can be saved.

    Of two that differ in one block only the better one is among them, where there are others enough.
    """
    (chosen,) = [trial for trial in selection.trials if trial.removed == selection.chosen.removed]
    complete = [trial for trial in selection.trials if trial.num_samples == chosen.num_samples]
    apart: list[Trial] = [chosen]
    near: list[Trial] = []
    for trial in complete:
        if trial is chosen or not removable(trial.removed):
            continue
        blocks = set(trial.removed)
        far = all(len(blocks.difference(other.removed)) > 1 for other in apart)
        (apart if far else near).append(trial)
    return [*apart, *near][:FINALISTS]


def _text_to_fit(model: nn.Module, samples: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The samples that the last candidates are repaired with; none, and why is said, where they cannot be repaired."""
    reason, text = "", []
    if is_offloaded(model):
        reason = "its blocks are not in memory"
    elif is_quantized(model):
        reason = "its weights are quantised"
    else:
        text = _enough(model, samples, seed)
        reason = "" if text else "there is too little text"
    if reason:
        console.print(f"The last candidates are compared without a repair: {reason}.", highlight=False)
    return text


def _enough(model: nn.Module, samples: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The first samples, as many as a quick repair takes; none where all of them are too few."""
    needed = least_tokens(model)
    text: list[Tensor] = []
    for sample in samples:
        if sum(map(len, text)) >= _ENOUGH * needed:
            break
        text.append(sample)
    fits = len(text) > 1 and Text(text, batch_size=1, seed=seed).num_tokens >= needed > 0
    return text if fits else []


def _measured(
    model: nn.Module,
    trial: Trial,
    units: Units,
    objective: str,
    samples: Sequence[Tensor],
    text: Sequence[Tensor],
    settings: ChoosingSettings,
) -> dict[str, Any]:
    """The objective of a removal after a repair, and what that took."""
    started = time.perf_counter()
    shortened = remove_blocks(model, trial.removed, units=units, copy=False)
    blocks = trial.removed if units == "blocks" else None
    report = repair(shortened, model, text, removed=blocks, batch_size=settings.batch_size, seed=settings.seed)
    quality = quality_of(shortened, model, samples, settings.batch_size)

    # In passes over the selection samples: the repair, and the measurement with that of the original beside it.
    share = sum(map(len, text)) / sum(map(len, samples))
    left = count_parameters(find_stack(shortened).layers) / count_parameters(find_stack(model).layers)
    passes = share * report.passes + 1 + left
    value = quality.kl if objective == "kl" else quality.loss
    seconds = time.perf_counter() - started
    return {"removed": trial.removed, "value": value, "passes": passes, "seconds": seconds}
