"""What blockspin.json says of a shortened checkpoint: what was removed from what, over all removals since the original.

`removed` and `kept` are blocks and count as in `source`, the model that the last removal started from; where
sub-layers were removed, `sublayers` has their numbers, and `removed` the blocks that lost all of them. `original` says
the same of the first one, and `earlier` holds the records of the removals before the last, the first of them in front.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from .. import __version__
from ..errors import first_line
from ..model import fingerprint
from ..problem import Removal, Units

RECORD = "blockspin.json"
_ABOUT_EARLIER = ("original", "earlier")


def record_removal(
    folder: Path,
    source: str | Path,
    removed: Removal,
    kept: Sequence[int],
    left_behind: Sequence[str],
    details: dict[str, Any],
) -> dict[str, Any]:
    """The record of a removal from the checkpoint in `folder`, which may have one itself.

    source: what the user calls that checkpoint. left_behind: names of files that were not taken along.
    details: of how the blocks were chosen.

    Raises:
        ValueError: the record in the folder is not readable, or does not belong to the model.
    """
    earlier: list[dict[str, Any]] = []
    original = {"source": str(source), "removed": list(removed), "kept": list(kept)}
    before = read_record(folder)
    if before is not None:
        if len(before["kept"]) != len(removed) + len(kept):
            raise ValueError(
                f"{folder / RECORD} tells of {len(before['kept'])} kept blocks, but the model has "
                f"{len(removed) + len(kept)}; it belongs to another model, take it away"
            )
        latest = {name: entry for name, entry in before.items() if name not in _ABOUT_EARLIER}
        earlier = [*before.get("earlier", []), latest]
        original = _since_original(earlier, kept)

    record = {
        "source": str(source),
        "removed": list(removed),
        "kept": list(kept),
        "original": original,
        "earlier": earlier,
        "left_behind": list(left_behind),
        "fingerprint": fingerprint.of_model(folder),
        "blockspin": __version__,
        "transformers": transformers.__version__,
    }
    return record | details


def tells_of(target: Path, folder: Path, source: str | Path, removed: Sequence[int], units: Units = "blocks") -> bool:
    """Whether the record in `target` says that it was made by this removal, from `folder` as it is now.

    Raises:
        ValueError: the record is not readable.
    """
    record = read_record(target)
    if record is None or "distillation" in record:  # trained since
        return False
    told = record.get("sublayers") if units == "sublayers" else record["removed"]
    same_removal = told == sorted(removed) and record.get("source") == str(source)
    return same_removal and record.get("fingerprint") == fingerprint.of_model(folder)


def _since_original(earlier: Sequence[dict[str, Any]], kept: Sequence[int]) -> dict[str, Any]:
    """What was removed in all, by the blocks of the model that the first removal started from."""
    for record in reversed(earlier):
        kept = [record["kept"][i] for i in kept]
    first = earlier[0]
    depth = len(first["kept"]) + len(first["removed"])
    removed = sorted({*range(depth)} - {*kept})
    return {"source": first["source"], "removed": removed, "kept": list(kept)}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the last removal that made a checkpoint; None if there is none.

    Raises:
        ValueError: it is not readable.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable ({first_line(error)}); take it away") from error

    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record of a removal; take it away")
    if "kept" not in record:  # of a training without a removal
        return None
    for entry in [record, *record.get("earlier", [])]:
        for name in ("removed", "kept"):
            indices = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(indices, list) or not all(type(i) is int for i in indices):
                raise ValueError(f"{path} does not tell which blocks were {name}; take it away")
    found: dict[str, Any] = record
    return found


def kept_blocks_of(folder: Path, depth: int) -> list[int] | None:
    """Which blocks of the model it came from a shortened checkpoint has; None where no record tells.

    depth: the number of blocks of that model, which may be the original or one in between.

    Raises:
        ValueError: the record is not readable.
    """
    record = read_record(folder)
    if record is None:
        return None
    kept: list[int] = list(range(len(record["kept"])))
    for step in [record, *reversed(record.get("earlier", []))]:
        kept = [step["kept"][i] for i in kept]
        if len(step["kept"]) + len(step["removed"]) == depth:
            return kept
    return None
