"""The teacher's most probable tokens at every place of a text, kept on disk, so that the teacher runs over it once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..data.packing import Windows
from ..files import write_json
from ..journal import check_settings
from ..model.batches import frozen, input_device
from ..model.head import SplitModel, widened
from ..progress import console, track
from ..tables import short
from .loss import split

TOKENS_AT_ONCE = 8192  # of the teacher's passes
BYTES = 8  # of a kept token: its number as int32, its log-probability as float32
TOKENS, VALUES = "tokens.int32", "values.float32"  # files


class TeachersView(Dataset[dict[str, Tensor]]):
    """Windows of token ids with the teacher's most probable next tokens.

    An item has input_ids (length,), teacher_tokens (length, k) int64 and teacher_values (length, k) float32, their
    log-probabilities; what is left to 1 belongs to all other tokens.
    """

    def __init__(self, windows: Windows, folder: Path, k: int) -> None:
        self.windows = windows
        shape = (*windows.rows.shape, k)
        self.tokens: NDArray[np.int32] = np.memmap(folder / TOKENS, np.int32, "r+", shape=shape)
        self.values: NDArray[np.float32] = np.memmap(folder / VALUES, np.float32, "r+", shape=shape)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {**self.windows[index], "teacher_tokens": tokens, "teacher_values": torch.tensor(self.values[index])}


def teachers_view(
    windows: Windows,
    folder: Path,
    k: int,
    temperature: float,
    teacher: str,
    load_teacher: Callable[[], PreTrainedModel],
) -> TeachersView:
    """The teacher's view of all windows, from `folder` or computed now; a call that was cut off is continued.

    k: tokens that are kept at each place. temperature: divides the teacher's logits. teacher: its fingerprint.
    load_teacher: called if it has to run.

    Raises:
        ValueError: the folder holds something else, or the disk has no room.
    """
    text = hashlib.sha256(windows.rows.tobytes()).hexdigest()
    settings = {"teacher": teacher, "text": text, "top_k": k, "temperature": temperature}
    stored, finished = folder / "settings.json", folder / "finished.json"
    known = json.loads(stored.read_text()) if stored.is_file() else None
    check_settings(folder, "teacher's cache", known, settings, "--cache-teacher")
    if known is None:
        check_space(windows.rows.size, folder, k)
        write_json(stored, settings)

    done: int = json.loads(finished.read_text()) if finished.is_file() else 0
    if not done:  # files of the whole size, which take no space until they are filled
        for name in (TOKENS, VALUES):
            with (folder / name).open("wb") as file:
                file.truncate(windows.rows.size * k * BYTES // 2)

    view = TeachersView(windows, folder, k)
    if done < len(windows):
        model = load_teacher()
        with frozen(model):
            _fill(view, split(model), temperature, done, finished)
    return view


def check_space(places: int, folder: Path, k: int) -> None:
    """Say how much disk the view of so many tokens takes.

    Raises:
        ValueError: there is not as much.
    """
    needed, there = places * k * BYTES, next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"no room for the teacher's cache: {short(needed, 'B')} are needed for {places:,} tokens and "
            f"{short(free, 'B')} are free in {there} (--cache-teacher); lower --top-k or --max-steps"
        )
    console.print(f"The teacher's cache takes {short(needed, 'B')}: {k} of its tokens at {places:,} places.")


def _fill(view: TeachersView, teacher: SplitModel, temperature: float, done: int, finished: Path) -> None:
    """Run the teacher over the windows that are not finished yet."""
    length = view.windows.rows.shape[1]
    at_once = max(1, TOKENS_AT_ONCE // length)  # windows
    starts = range(done, len(view), at_once)
    total = -(-len(view) // at_once)
    for start in track(starts, "Teacher", total, done=total - len(starts)):
        rows = view.windows.rows[start : start + at_once]
        token_ids = torch.from_numpy(rows.astype(np.int64)).to(input_device(teacher.model))
        with torch.no_grad():
            hidden = teacher.hidden(input_ids=token_ids).flatten(0, 1)  # (tokens, width)
            values, tokens = _most_probable(hidden, teacher, temperature, view.tokens.shape[-1])

        part: Any = slice(start, start + len(rows))
        view.tokens[part] = tokens.cpu().numpy().reshape(len(rows), length, -1)
        view.values[part] = values.cpu().numpy().reshape(len(rows), length, -1)
        view.tokens.flush()  # type: ignore[attr-defined]
        view.values.flush()  # type: ignore[attr-defined]
        write_json(finished, start + len(rows))


def _most_probable(hidden: Tensor, teacher: SplitModel, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """(tokens, k) log-probabilities and token ids, from hidden states (tokens, width), a chunk at a time."""
    values, tokens = [], []
    for chunk in torch.split(hidden, 1024):
        logits = widened(teacher.logits(chunk))  # (chunk, vocabulary)
        found = (logits / temperature).log_softmax(-1).topk(k)  # (chunk, k) each
        values.append(found.values.float())
        tokens.append(found.indices)
    return torch.cat(values), torch.cat(tokens)
