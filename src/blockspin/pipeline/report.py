"""The page of a run of `compress`: what was removed, what it costs and saves, and how it was chosen."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from .. import page
from ..config import CompressConfig
from ..costs.targets import Met, goals_table
from ..costs.timing import Check
from ..evaluation.perplexity import Evaluation, percent_above, results_table
from ..files import replacing
from ..page import BLUE, LINE, MUTE
from ..problem import NOUNS
from ..selection.result import Selection
from ..surgery.provenance import read_record
from ..tables import Table, ranges, short
from ..training import DistillConfig
from .origin import command_options, goal_text, model_title, public_settings

FAR = 2.0  # times the objective of the chosen one; what is above that is not shown
_UNITS = 2  # the column of the removed units in a table of results
OBJECTIVES = {"kl": "KL divergence from the original (nats a token)", "loss": "loss (nats a token)"}

_MEASURED = (
    "Measured on text that nothing was chosen on; ± is one standard error. CBO:0 is the removal of lowest energy. "
    "Percentages and factors are relative to the original."
)
_STAGES = {
    "repaired": "the choice with new weights in its linear maps, found in closed form",
    "distilled": "the same after training with the original as its teacher",
}
_SOURCES = (
    "CBO:k is the state of the k-th lowest energy, counted from 0; resampled would be the lowest with other samples; "
    "polish:k was proposed in round k by what had been measured until then; the rest is what cheap methods choose. "
    "Energy is what was predicted; kl or loss is in nats a token; repaired is the same after a quick repair. ± is one "
    "standard error."
)


def write_run_report(folder: Path) -> Path:
    """Make report.html of a finished run. Returns its path.

    Raises:
        ValueError: the folder holds no finished run.
    """
    results = folder / "evaluation.json"
    if not results.is_file():
        raise ValueError(f"{folder} holds no finished run; run blockspin compress again to continue it")
    rows = list(map(Evaluation.from_json, json.loads(results.read_text())))
    config = CompressConfig(**CompressConfig.read(folder / "run.yaml"))
    selection = Selection.load(folder / "candidates.json")
    record = read_record(folder / "checkpoint") or {}
    num_units = len(record.get("blocks", ())) or rows[0].num_blocks
    goals = json.loads((folder / "goals.json").read_text()) if (folder / "goals.json").is_file() else {}

    with replacing(folder / "report.html") as temporary:
        text = report_page(config, rows, selection, num_units, record, goals)
        temporary.write_text(text, encoding="utf-8")
    return folder / "report.html"


def report_page(
    config: CompressConfig,
    rows: Sequence[Evaluation],
    selection: Selection,
    num_units: int,
    record: Mapping[str, Any],
    goals: Mapping[str, Any],
) -> str:
    """The HTML page.

    num_units: blocks of the original, or sub-layers where those are removed. record: what blockspin.json of the
    checkpoint says. goals: what is in goals.json, if there is one.
    """
    original, chosen = rows[0], chosen_row(rows)
    model = model_title(config.model)
    noun = NOUNS[config.units]
    about = record.get("about", {})
    date = f" · {about['date']}" if "date" in about else ""

    strips = []
    for row in rows[1:]:
        strips.append((row.name, page.block_strip(row.removed, num_units), row == chosen))

    # The number of a sub-layer does not say whether it is an attention or an MLP.
    named = [page.paragraph(f"Gone: {', '.join(record['gone'])}.")] if "gone" in record else []
    parts = [
        page.header(
            f"blockspin compress · {model}{date}", *headline(original, chosen, model, selection, f"{num_units} {noun}")
        ),
        page.tiles(numbers_of(original, chosen, noun)),
        page.figure(
            choice_figure(selection),
            "choice",
            "Every point is a removal that was measured on the samples of the choice, with one standard error; the "
            "filled one was chosen. Pale ones left early, with fewer samples, and scatter more; those twice as far "
            "from the original are not shown.",
            narrow=choice_figure(selection, narrow=True),
        ),
        page.section(
            "What it costs and saves",
            [
                page.html_table(_with_units_last(results_table(rows, config.units)), [rows.index(chosen)]),
                page.paragraph(_measured(rows)),
            ],
            shown=True,
        ),
        *_targets(goals),
        page.section(f"Which {noun} are gone", [page.block_map(strips), *named], "number 0 is at the left", shown=True),
        page.section(
            "The best removals that were measured", [page.html_table(selection.table()), page.paragraph(_SOURCES)]
        ),
        _origin(config, about),
    ]
    return page.page(f"blockspin: {model}", parts)


def _measured(rows: Sequence[Evaluation]) -> str:
    """What the table of results shows, with the stages after the choice that are in it."""
    stages = [f" {row.name.capitalize()}: {_STAGES[row.name]}." for row in rows if row.name in _STAGES]
    return _MEASURED + "".join(stages)


def _with_units_last(table: Table) -> Table:
    """The table of results for a page, where the long list of units would push the numbers out of a phone."""
    columns, rows = list(table.columns), [list(row) for row in table.rows]
    columns.append(columns.pop(_UNITS))
    for row in rows:
        row.append(row.pop(_UNITS))
    return replace(table, columns=columns, rows=rows)


def _targets(goals: Mapping[str, Any]) -> list[str]:
    """The section about the targets, where there are any."""
    if not goals:
        return []
    parts = [page.html_table(goals_table([Met(**values) for values in goals["goals"]]))]
    if "times" in goals:
        parts.append(page.paragraph(Check.from_json(goals["times"]).summary()))
    return [page.section("What it was to cost at most", parts, shown=True)]


def chosen_row(rows: Sequence[Evaluation]) -> Evaluation:
    """The model that a run is about, of its last stage: trained, else repaired, else as it was chosen."""
    by_name = {row.name: row for row in rows}
    chosen = next(row for row in rows if row.name.startswith("chosen"))
    return by_name.get("distilled", by_name.get("repaired", chosen))


def headline(original: Evaluation, chosen: Evaluation, model: str, selection: Selection, units: str) -> tuple[str, str]:
    """What was found in a sentence, and how it was chosen in another. units: "30 blocks"."""
    rise, spread = percent_above(*chosen.above(original))
    faster = chosen.times_as_fast(original)
    speed = "" if faster is None else f" and runs {faster:.2f} times as fast"
    first = (
        f"Without {len(chosen.removed)} of its {units}, {model} keeps "
        f"{chosen.num_parameters / original.num_parameters:.0%} of its parameters{speed}; "
        f"its perplexity {'rises' if rise >= 0 else 'falls'} by {abs(rise):.1f}%{spread}."
    )
    repairs = f", and {selection.repair_passes:.0f} to repair the last of them" if selection.repair_passes else ""
    second = (
        f"They were chosen among {len(selection.trials)} removals that were measured, at the cost of "
        f"{selection.passes:.0f} forward passes over the samples of the choice{repairs}."
    )
    return first, second


def numbers_of(original: Evaluation, chosen: Evaluation, noun: str) -> list[tuple[str, str]]:
    """What was removed, what it costs, what it saves. noun: of what was removed."""
    rise, spread = percent_above(*chosen.above(original))
    saved, faster = 1 - chosen.num_bytes / original.num_bytes, chosen.times_as_fast(original)
    numbers = [
        (f"{len(chosen.removed)} {noun}", f"removed: {ranges(chosen.removed)}"),
        (
            f"{rise:+z.1f}%{spread}".replace("-", "−"),
            f"perplexity: {original.perplexity:.4g} becomes {chosen.perplexity:.4g}",
        ),
        (f"−{saved:.0%}", f"on disk: {short(original.num_bytes, 'B')} become {short(chosen.num_bytes, 'B')}"),
    ]
    if faster is not None:
        numbers.append((f"{faster:.2f}x", "tokens a second, reading a text"))
    return numbers


def choice_figure(selection: Selection, *, narrow: bool = False) -> Figure:
    """Energy against the measured objective: what the solver predicted, and what is so."""
    figure = Figure(figsize=(4.4, 4.2) if narrow else (8.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    most = max(trial.num_samples for trial in selection.trials)
    groups = (("left the race early", MUTE, False), ("measured on all samples", BLUE, True))
    for label, colour, to_the_end in groups:
        shown = []
        for trial in selection.trials:
            if trial.energy is not None and (trial.num_samples == most) == to_the_end:
                shown.append(trial)
        if not shown:
            continue
        axes.errorbar(
            [trial.energy or 0.0 for trial in shown],
            [trial.loss for trial in shown],
            yerr=[trial.standard_error or 0.0 for trial in shown],
            fmt="o",
            ms=4.5,
            mfc="none",
            color=colour,
            elinewidth=0.8,
            label=label,
        )

    # Not always the lowest: the choice looks at what is expected on other text, and after a repair.
    best, chosen = selection.trials[0], selection.chosen
    if chosen.energy is not None and chosen.loss is not None:
        label = f"chosen: {ranges(chosen.removed)}"
        axes.plot(chosen.energy, chosen.loss, "o", color=BLUE, ms=11, label=label, zorder=4)

    # Removals that are far worse would press the others together.
    near = [trial for trial in selection.trials if trial.loss <= FAR * best.loss and trial.energy is not None]
    if best.loss > 0 and len(near) > 1:
        energies = [trial.energy or 0.0 for trial in near]
        margin = 0.05 * (max(energies) - min(energies)) or 1.0
        axes.set_xlim(min(energies) - margin, max(energies) + margin)
        axes.set_ylim(top=(1 + 0.2 * (FAR - 1)) * max(trial.loss for trial in near), bottom=0.8 * best.loss)
    axes.set(xlabel="energy: what was predicted", ylabel=OBJECTIVES.get(selection.objective, selection.objective))
    axes.grid(color=LINE, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=1 if narrow else 3, fontsize=9.5, frameon=False)
    return figure


def _origin(config: CompressConfig, about: dict[str, str]) -> str:
    """Where the numbers come from: machine, data, settings, command."""
    settings = public_settings(asdict(config))
    words = ["blockspin compress", shlex.quote(settings["model"]), goal_text(config.remove), command_options(settings)]
    if config.distill is not None:
        words += ["--distill", command_options(settings["distill"], DistillConfig, "distill_")]
    command = " ".join(filter(None, [*words, "--out DIR"]))
    parts = [
        page.facts(about),
        page.code(command),
        page.code(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)),
    ]
    return page.section("How this was made", parts, "machine, data, settings, command")
