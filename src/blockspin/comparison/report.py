"""A comparison as tables and one self-contained HTML page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from .. import page
from ..energies import load_energies
from ..evaluation.perplexity import percent_above
from ..evaluation.scores import AT_CHANCE
from ..files import replacing
from ..pipeline.origin import command_options, goals_text, model_title, public_settings
from ..problem import NOUNS, Goal, Units
from ..scatter import plus_minus
from ..solvers import Spectrum
from ..tables import Column, Table, ranges, short, write_csv
from ..targets import target_text
from .figures import (
    energy_figure,
    hessian_figure,
    quality_figure,
    spectrum_figure,
    states_figure,
)
from .methods import PAPER
from .repairs import repairs_tables
from .results import ORIGINAL, Comparison, Row, averaged, energy_key, file_part, goal_title

_WORDS = ("goal", "method", *NOUNS.values())  # columns that hold no numbers
_IN_PAGE = ("method", "KL", "loss above", "perplexity", "top-1", "parameters", "speed")
_CAPTIONS = {
    "quality": "How far the model is from the original, against how much of it is gone; lower is better, bars are one "
    "standard error. Methods above the frame are in the tables.",
    "energy": "Energy against measured loss: the lowest states of each energy and random removals. "
    "ρ is Spearman's rank correlation: does the energy order removals as their measured loss does?",
    "states": "Each line is a removal of low energy, the lowest (CBO:0) at the top; filled cells go, number 0 is "
    "at the left.",
    "spectrum": "The energies of the lowest states: certified (line), and as tabu search finds them (circles).",
    "hessian": "The matrices of the energies. An entry off the diagonal says that two of them cost more (red) or less "
    "(blue) together than apart.",
}
_TITLES = {
    "energy": "Does the energy predict the loss?",
    "states": "The removals of lowest energy",
    "spectrum": "How the energies grow, and what is proven",
    "hessian": "The energies themselves",
}
_COLUMNS = (
    "Ordered by the objective that was minimised. KL: divergence from the original in nats a token. Loss above: that "
    "of the original, in nats a token. Top-1: how often the most likely token is the original's. Passes: what finding "
    "the removal cost, in forward passes over the calibration samples. ± is one standard error over the samples; the "
    "errors of two methods on the same text are not independent."
)


def write_report(folder: str | Path) -> Path:
    """Make every table and figure of a comparison: comparison.csv and .md, repairs.md, figures/*.svg and report.html.

    folder: one made by `comparison.compare`. Returns the path of the page.

    Raises:
        ValueError: the folder holds no finished comparison.
    """
    folder = Path(folder)
    comparison = Comparison.load(folder / "comparison.json")
    if not comparison.rows:
        raise ValueError(f"{folder} holds no finished comparison yet; run blockspin compare again to continue it")

    depth = len(load_energies(folder / f"{PAPER}.safetensors").blocks)
    drawings = draw_figures(comparison, folder, depth)
    for name, drawing in drawings.items():
        with replacing(folder / "figures" / f"{name}.svg") as temporary:
            drawing.savefig(temporary, format="svg", bbox_inches="tight", metadata={"Date": None})

    with replacing(folder / "comparison.csv") as temporary:
        write_csv(records(comparison.rows), temporary)
    with replacing(folder / "comparison.md") as temporary:
        temporary.write_text(table_of(comparison.rows, comparison.settings["objective"], comparison.units).markdown())
    if comparison.repaired:
        with replacing(folder / "repairs.md") as temporary:
            parts = [f"## {table.title}\n\n{table.markdown()}" for table in repairs_tables(comparison)]
            temporary.write_text("\n".join(parts))
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(report_page(comparison, drawings, depth))
    return folder / "report.html"


def draw_figures(comparison: Comparison, folder: Path, depth: int) -> dict[str, Figure]:
    """Every figure by name, in the order of the page. folder: where the energies and spectra lie.

    depth: units of the model.
    """
    names = list(dict.fromkeys([comparison.settings["energy"], PAPER]))  # one, if ours is the paper's
    hessians = {}
    for name in names:
        for kept in dict.fromkeys(energy_key(name, goal) for goal in comparison.landscape):
            hessians[kept] = load_energies(folder / f"{file_part(kept)}.safetensors").hessian

    # A panel for each goal and energy; those of one goal stay together.
    spectra, tabu = {}, {}
    for goal in comparison.landscape:
        for name in names:
            panel, file = f"{goal_title(goal)}, {name}", f"spectrum-{file_part(goal)}-{name}"
            spectra[panel] = Spectrum.load(folder / f"{file}.json")
            tabu[panel] = Spectrum.load(folder / f"{file}-tabu.json")

    noun = NOUNS[comparison.units]
    return {
        "quality": quality_figure(comparison.rows, comparison.settings["objective"]),
        "energy": energy_figure(comparison.landscape, names),
        "states": states_figure(spectra, depth, len(names), noun=noun),
        "spectrum": spectrum_figure(spectra, tabu, len(names)),
        "hessian": hessian_figure(hessians, noun),
    }


def text_rows(rows: Sequence[Row], objective: str = "loss", units: Units = "blocks") -> list[dict[str, str]]:
    """The averaged rows as text, by the names of the columns; the original once for each goal."""
    lines = []
    for row in averaged(rows, objective):
        if row.method == ORIGINAL:  # the first of its goal
            original = row
        lines.append(cells(row, original, units))
    return lines


def cells(row: Row, original: Row, units: Units) -> dict[str, str]:
    """A row as text; "speed" is relative to the original of the same goal, and part of "tokens/s" as well.

    The last column is called as the units are.
    """
    speed = f"{row.tokens_per_second / original.tokens_per_second:.2f}x"
    which = ranges(row.removed)
    if row.windows:
        which += " merged " + _windows_text(row)
    elif not row.removed and row.method != ORIGINAL:
        which = "several draws"

    scores = {score.task: score.as_text() for score in row.scores}
    return {
        "goal": row.goal,
        "method": row.method,
        "removed": str(len(row.removed)) if row.removed else "",
        "perplexity": f"{row.perplexity:.4g}",
        "loss above": f"{row.loss - original.loss:.4f}{_spread(row, row.above_error)}",
        "KL": f"{row.kl:.4f}{_spread(row, row.kl_error)}",
        "top-1": f"{row.agreement:.1%}",
        "parameters": f"{row.num_parameters / 1e6:.4g} M",
        "MB": f"{row.num_bytes / 1e6:.4g}",
        "tokens/s": f"{row.tokens_per_second:,.0f} ({speed})",
        "speed": speed,
        **scores,
        "passes": f"{row.passes:.3g}",
        "seconds": f"{row.seconds:.3g}",
        NOUNS[units]: which,
    }


def _spread(row: Row, error: float | None) -> str:
    """The standard error of what a row has more than the original; of the original itself nothing."""
    return "" if row.method == ORIGINAL else plus_minus(error)


def table_of(rows: Sequence[Row], objective: str, units: Units) -> Table:
    """Every column for all goals, in each the lowest objective first."""
    lines = text_rows(rows, objective, units)
    shown = [heading for heading in lines[0] if heading != "speed"]
    return _table(lines, shown, caption=AT_CHANCE if rows[0].scores else "")


def terminal_tables(rows: Sequence[Row], objective: str, units: Units = "blocks") -> list[Table]:
    """A table for each goal, the lowest objective first; what is left out here is in the files."""
    tasks = [score.task for score in rows[0].scores]
    shown = ["method", "removed", "perplexity", "KL", "top-1", "speed", *tasks, "passes", "seconds", NOUNS[units]]
    marked = any(score.at_chance for row in rows for score in row.scores)

    goals: dict[str, list[dict[str, str]]] = {}
    for line in text_rows(rows, objective, units):
        goals.setdefault(line["goal"], []).append(line)

    tables = []
    for goal, lines in goals.items():
        tables.append(_table(lines, shown, goal_title(goal), AT_CHANCE if marked else ""))
    return tables


def _table(lines: Sequence[Mapping[str, str]], shown: Sequence[str], title: str = "", caption: str = "") -> Table:
    """Some columns of lines of text."""
    columns = [Column(heading, words=heading in _WORDS) for heading in shown]
    rows = []
    for line in lines:
        rows.append([line[heading] for heading in shown])
    return Table(columns, rows, title, caption)


def _windows_text(row: Row) -> str:
    """The merged windows as "3-5 9-11"."""
    return " ".join(f"{lowest}-{highest}" for lowest, highest in row.windows)


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every row with full digits, draws one by one; blocks and windows separated by spaces."""
    found = []
    for row in rows:
        record = dict(vars(row))
        del record["scores"]
        record["removed"] = " ".join(map(str, row.removed))
        record["windows"] = _windows_text(row)
        record["perplexity"] = row.perplexity
        for score in row.scores:
            record[score.task] = score.value
        found.append(record)
    return found


def report_page(comparison: Comparison, drawings: Mapping[str, Figure], depth: int) -> str:
    """The HTML page. depth: units of the model."""
    rows, objective, units = comparison.rows, comparison.settings["objective"], comparison.units
    noun = NOUNS[units]
    goals = list(dict.fromkeys(row.goal for row in rows))
    told = goals[len(goals) // 2]  # the goal that the headline is about
    model = model_title(comparison.settings["model"])
    date = comparison.about.get("date", "")

    parts = [
        page.header(
            f"blockspin compare · {model} {'· ' + date if date else ''}",
            *headline(rows, told, objective, model, depth, noun),
        ),
        page.tiles(numbers_of(rows, told, noun)),
        page.figure(
            drawings["quality"],
            "quality",
            _CAPTIONS["quality"],
            narrow=quality_figure(rows, objective, narrow=True),
        ),
    ]
    for goal in goals:
        table, marked = goal_table(rows, goal, objective, units)
        note = f"{len(table.rows) - 1} methods and the original"
        inside = [page.html_table(table, marked), page.paragraph(_COLUMNS)]
        parts.append(page.section(_sentence(goal_title(goal)), inside, note, shown=goal == told))

    for table in repairs_tables(comparison):
        parts.append(page.section(_sentence(table.title), [page.html_table(table)]))
    parts.append(page.section(f"Which {noun} each method removes", [method_map(rows, objective, depth)], shown=True))
    for name, title in _TITLES.items():
        parts.append(page.section(title, [page.figure(drawings[name], name, _CAPTIONS[name])]))
    if comparison.left_out:
        parts.append(page.section("Left out", [page.facts(comparison.left_out)]))
    parts.append(origin_section(comparison, goals))
    return page.page(f"blockspin: {model}", parts)


def _sentence(words: str) -> str:
    """With a capital at the start."""
    return words[0].upper() + words[1:]


def headline(rows: Sequence[Row], goal: str, objective: str, model: str, depth: int, noun: str) -> tuple[str, str]:
    """What was found, in a sentence; and how the methods compare, in another. depth, noun: 30 "blocks"."""
    original, ranked = ranked_rows(rows, goal, objective)
    ours = next((row for row in ranked if row.is_ours), ranked[0])
    rise, error = percent_above(*ours.measured("loss", original))
    gone = f"{len(ours.removed)} of its {depth} {noun}" if ours.removed else goal
    first = (
        f"Without {gone}, {model} keeps {ours.num_parameters / original.num_parameters:.0%} of its parameters and runs "
        f"{ours.tokens_per_second / original.tokens_per_second:.2f} times as fast; its perplexity "
        f"{'rises' if rise >= 0 else 'falls'} by {abs(rise):.1f}%{error}."
    )

    name = {"kl": "KL divergence from the original", "loss": "loss"}[objective]
    place = ranked.index(ours) + 1
    value, spread = ours.measured(objective, original)
    best = next((row for row in ranked if not ours.removed or row.removed != ours.removed), ours)
    other, other_spread = best.measured(objective, original)
    told = f"{value:.4f}{plus_minus(spread)}", f"{other:.4f}{plus_minus(other_spread)}"
    asked = f"{goal_title(goal)} {noun}" if goal.isdigit() else goal_title(goal)
    second = (
        f"Of {len(ranked)} ways to {asked}, blockspin's choice "
        f"({ours.method}) is number {place} by {name} on text that none of them had seen: {told[0]} nats a token, "
        f"against {told[1]} of {best.method}."
    )
    return first, second


def numbers_of(rows: Sequence[Row], goal: str, noun: str) -> list[tuple[str, str]]:
    """What was removed, what it costs, what it saves: large numbers with their words."""
    original, ranked = ranked_rows(rows, goal, "kl")
    ours = next((row for row in ranked if row.is_ours), ranked[0])
    rise, error = percent_above(*ours.measured("loss", original))
    saved = 1 - ours.num_bytes / original.num_bytes
    faster = ours.tokens_per_second / original.tokens_per_second
    return [
        (f"{len(ours.removed)} {noun}" if ours.removed else goal, f"removed: {ranges(ours.removed)}"),
        (f"{rise:+z.1f}%{error}", f"perplexity: {original.perplexity:.4g} becomes {ours.perplexity:.4g}"),
        (f"−{saved:.0%}", f"on disk: {short(original.num_bytes, 'B')} become {short(ours.num_bytes, 'B')}"),
        (f"{faster:.2f}x", "tokens a second, reading a text"),
    ]


def ranked_rows(rows: Sequence[Row], goal: str, objective: str) -> tuple[Row, list[Row]]:
    """The original, and the methods for a goal, the lowest objective first."""
    original, *ranked = [row for row in averaged(rows, objective) if row.goal == goal]
    return original, ranked


def goal_table(rows: Sequence[Row], goal: str, objective: str, units: Units) -> tuple[Table, list[int]]:
    """The methods for a goal, the original in front, and which of its rows are ours."""
    original, ranked = ranked_rows(rows, goal, objective)
    tasks = [score.task for score in original.scores]
    headings = [*_IN_PAGE, *tasks, "passes", NOUNS[units]]
    if objective == "loss":  # what is minimised comes first
        headings[1:3] = ["loss above", "KL"]

    lines = [cells(row, original, units) for row in [original, *ranked]]
    marked = [number for number, row in enumerate([original, *ranked]) if row.is_ours]
    return _table(lines, headings, caption=f"Scores in percent; {AT_CHANCE}." if tasks else ""), marked


def method_map(rows: Sequence[Row], objective: str, depth: int) -> str:
    """For each goal, method by method, what is removed. depth: units of the model."""
    lines: list[tuple[str, str, bool]] = []
    for goal in dict.fromkeys(row.goal for row in rows):
        lines.append((goal_title(goal), "", False))
        _, ranked = ranked_rows(rows, goal, objective)
        for row in ranked:
            if row.removed:
                merged = [lowest for lowest, _ in row.windows]
                removed = [block for block in row.removed if block not in merged]
                lines.append((row.method, page.block_strip(removed, depth, merged), row.is_ours))

    colours = (("accent", "removed"), ("merged", "holds merged weights"), ("line", "stays"))
    keys = "".join(f'<i class="key" style="background:var(--{name})"></i>{words}' for name, words in colours)
    return f'<p class="soft">Number 0 is at the left.{keys}</p>{page.block_map(lines)}'


def origin_section(comparison: Comparison, goals: Sequence[str]) -> str:
    """Where the numbers come from: machine, data, settings, command."""
    settings = public_settings(comparison.settings)
    model, options = shlex.quote(settings["model"]), command_options(settings)

    # A command for each set of targets.
    removes: dict[str, list[Goal | None]] = {}
    for goal in goals:
        if goal in comparison.goals:
            asked = comparison.goals[goal]
            targets = " ".join(target_text(name, amount) for name, amount in asked.targets.items())
            removes.setdefault(targets, []).append(asked.remove)
    commands = []
    for targets, together in removes.items():
        words = ["blockspin compare", model, goals_text(together), targets, options, "--out DIR"]
        commands.append(" ".join(filter(None, words)))
    parts = [
        page.facts(comparison.about),
        page.code("\n".join(commands)),
        page.code(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)),
    ]
    return page.section("How this was measured", parts, "machine, data, settings, command")
