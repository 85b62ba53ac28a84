"""The model card of a shortened checkpoint: what it is, how it was made, and under which licence."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..files import replacing
from ..settings import flag
from ..sources import is_hub_id, public_name
from ..tables import Table, ranges
from ..training import DistillConfig

CARD = "README.md"
_LICENCE = ("license", "license_name", "license_link", "language")  # what holds for the smaller model too
_RESULTS = "## Quality"
_SOURCES = ("teacher", "data", "cache_teacher")  # settings of a training that may be paths
_OF_REPORTS = ("log_steps", "eval_steps", "save_steps", "report_to")  # those that leave its outcome as it is


def write_card(folder: Path, record: Mapping[str, Any], num_parameters: int, source_card: Path) -> None:
    """Write README.md into a checkpoint. What the original's card claims is not taken over, only its licence.

    record: what blockspin.json says. num_parameters: of the smaller model. source_card: that of the model it was made
    from, which may not be there.
    """
    original = record.get("original", record)
    removed, kept = original["removed"], original["kept"]
    name, latest = public_name(original["source"]), public_name(record["source"])
    depth = len(removed) + len(kept)

    metadata = _licence_of(source_card)
    if is_hub_id(original["source"]):
        metadata["base_model"] = original["source"]
    data = ModelCardData(library_name="transformers", tags=["blockspin", "pruned"], **metadata)

    if "sublayers" in record:
        sublayers = record["sublayers"]
        title = f"{name} without {len(record['gone'])} sub-layers"
        gone, loads = ", ".join(record["gone"]), "with `trust_remote_code=True`"
        again = f"--units sublayers --blocks {ranges(sublayers)}"
    else:
        title = f"{name} without {len(removed)} of its {depth} blocks"
        gone, loads = f"the transformer blocks {ranges(removed)}", "like the original"
        again = f"--blocks {ranges(record['removed'])}"

    parts = [
        f"# {title}",
        f"This is {name} without {gone} (counted from 0): {len(kept)} blocks and {num_parameters:,} parameters are "
        f"left. The removal changed no other weight. It loads {loads}.",
        "## How the blocks were chosen",
        _how(record),
        "## How to make it again",
        f"```bash\nblockspin prune {shlex.quote(latest)} {again} --out smaller  # {_version(record)}\n```",
        "## What to expect",
        "Removing blocks costs quality, and how much depends on the task: measure it on yours. What the original's "
        "card reports was measured with all blocks and does not hold here; its terms of use and its limits do.",
    ]
    text = f"---\n{data}\n---\n\n" + "\n\n".join(parts) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def add_results(folder: Path, table: Table, about: str) -> None:
    """Put what was measured into the card of a checkpoint, before what to expect; once.

    about: on what it was measured.

    Raises:
        ValueError: the card cannot be written.
    """
    path = folder / CARD
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if _RESULTS in text:
        return
    head, heading, tail = text.partition("## What to expect")
    with replacing(path) as temporary:
        temporary.write_text(f"{head}{_RESULTS}\n\n{about}\n\n{table.markdown()}\n{heading}{tail}", encoding="utf-8")


def add_repair(folder: Path, shortened: str, record: Mapping[str, Any], summary: str) -> None:
    """Say at the end of the card of a checkpoint that its weights were repaired, and by which command.

    shortened: the folder that was repaired. record: what blockspin.json says, its entry "repair" in it; where that does
    not name the data, there is no command.

    Raises:
        ValueError: the card cannot be written.
    """
    if not (folder / CARD).is_file():
        return
    text = f"## Repair\n\n{summary} What was measured above was measured before the repair."
    if record["repair"]["data"] is not None:
        text += f"\n\n```bash\n{_repair_command(shortened, record['repair'])}\n```"
    _append(folder / CARD, text)


def _repair_command(shortened: str, repair: Mapping[str, Any]) -> str:
    """The command of a repair, with what decides its outcome."""
    name, original, data = map(public_name, (shortened, repair["original"], repair["data"]))
    words = ["blockspin", "repair", name, "--original", original, "--data", data]
    return shlex.join([*words, *_as_typed(repair["settings"]), "--out", "repaired"])


def add_training(folder: Path, student: str, record: Mapping[str, Any]) -> None:
    """Say at the end of the card of a checkpoint how its weights were trained.

    A card that is not ours speaks of the student as it was: of it only the licence stays.

    student: the folder that was trained. record: what blockspin.json says, its entry "distillation" in it.

    Raises:
        ValueError: the card cannot be written.
    """
    training = record["distillation"]
    settings, before, after = training["settings"], training["before"], training["after"]
    name, teacher, data = map(public_name, (student, settings["teacher"], settings["data"]))

    card = folder / CARD
    if "removed" not in record or not card.is_file():
        metadata = ModelCardData(library_name="transformers", tags=["blockspin"], **_licence_of(card))
        with replacing(card) as temporary:
            temporary.write_text(f"---\n{metadata}\n---\n\n# {name}, trained to follow {teacher}\n", encoding="utf-8")

    parts = [
        "## Training",
        f"The weights ({settings['train']}) were then trained in {training['steps']:,} steps on {data} to give the "
        f"distribution of {teacher} for the next token. On held-out text the KL divergence from it was "
        f"{before['kl']:.4f} nats a token before and {after['kl']:.4f} after; the perplexity was "
        f"{before['perplexity']:.2f} and is {after['perplexity']:.2f}. What is said above was measured before that.",
        f"```bash\n{_training_command(name, settings)}\n```",
    ]
    _append(card, "\n\n".join(parts))


def _training_command(student: str, settings: Mapping[str, Any]) -> str:
    """The command of a training, with what is not the default and decides its outcome."""
    defaults = asdict(DistillConfig())
    named, decisive = {}, {}
    for setting, value in settings.items():
        if setting in _SOURCES and value is not None:
            named[setting] = public_name(value)
        elif setting not in _OF_REPORTS and value != defaults[setting]:
            decisive[setting] = value
    words = ["blockspin", "distill", student, *_as_typed(named), *_as_typed(decisive)]
    return shlex.join([*words, "--out", "trained"])


def _as_typed(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options; those that are off or not given are left out."""
    words = []
    for setting, value in settings.items():
        if value is True:
            words.append(flag(setting))
        elif value is not None and value is not False:  # zero is a value
            words += [flag(setting), str(value)]
    return words


def _append(card: Path, section: str) -> None:
    """Add a section at the end of a card."""
    text = card.read_text(encoding="utf-8")
    with replacing(card) as temporary:
        temporary.write_text(f"{text.rstrip()}\n\n{section}\n", encoding="utf-8")


def _licence_of(card: Path) -> dict[str, Any]:
    """The licence and languages that a card names; nothing where there is no card or its head is not readable."""
    if not card.is_file():
        return {}
    try:
        found: Any = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        data: dict[str, Any] = found.to_dict()
    except Exception:  # people write what they like there, and the parsers raise errors of many kinds
        return {}
    return {name: data[name] for name in _LICENCE if data.get(name)}


def _how(record: Mapping[str, Any]) -> str:
    """Who proposed the removal, and what was measured of it."""
    candidate = record.get("candidate")
    if not candidate:
        return "They were named to `blockspin prune`."
    text = f"By `blockspin compress`, among many removals that were measured ({candidate['source']})"
    if candidate.get("loss") is not None:
        objective = {"kl": "KL divergence from the original", "loss": "loss"}[record.get("objective", "kl")]
        text += f": {objective} {candidate['loss']:.4f} nats a token on the samples of the choice"
    return (
        f"{text}. They were low states of a constrained binary optimisation problem (arXiv 2602.00161), and what "
        "simpler methods choose."
    )


def _version(record: Mapping[str, Any]) -> str:
    return f"blockspin {record['blockspin']}, transformers {record['transformers']}"
