"""A comparison as tables and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..energies import load_energies
from ..evaluation.scores import AT_CHANCE
from ..files import replacing
from ..solvers import Spectrum
from ..tables import Column, Table, ranges, write_csv
from .figures import blocks_figure, energy_figure, hessian_figure, loss_figure, spectrum_figure, states_figure
from .methods import PAPER
from .results import ORIGINAL, RANDOM, Comparison, Row, averaged

_HEADINGS = (
    "goal",
    "method",
    "perplexity",
    "loss",
    "KL",
    "top-1",
    "parameters",
    "MB",
    "tokens/s",
    "passes",
    "seconds",
    "removed",
)
_CAPTIONS = {
    "hessian": "The matrices of the energies. An entry off the diagonal says that two blocks cost more (red) or less "
    "(blue) together than apart.",
    "states": "Which blocks the states of lowest energy remove.",
    "energy": "Energy against measured loss: the lowest states of each energy and random removals. "
    "rho is Spearman's rank correlation: does the energy order removals as their measured loss does?",
    "spectrum": "The energies of the lowest states: certified, and as tabu search finds them.",
    "loss": "Loss on the evaluation text, above the original's, against the number of blocks removed.",
    "blocks": "The blocks that each method removes, best loss first.",
}


def write_report(folder: str | Path) -> Path:
    """Make every table and figure of a comparison: comparison.csv, comparison.md, figures/*.png and report.html.

    folder: one made by `comparison.compare`. Returns the path of the page.

    Raises:
        ValueError: the folder holds no finished comparison.
    """
    folder = Path(folder)
    comparison = Comparison.load(folder / "comparison.json")
    if not comparison.rows:
        raise ValueError(f"{folder} holds no finished comparison yet; run blockspin compare again to continue it")
    goals = list(dict.fromkeys(row.goal for row in comparison.rows))
    energies = {name: load_energies(folder / f"{name}.safetensors") for name in energy_names(comparison)}
    panels = {f"remove {goal}, {name}": (goal, name) for goal in goals for name in energies}
    spectra = {title: Spectrum.load(folder / f"spectrum-{goal}-{name}.json") for title, (goal, name) in panels.items()}
    tabu = {
        title: Spectrum.load(folder / f"spectrum-{goal}-{name}-tabu.json") for title, (goal, name) in panels.items()
    }
    depth = len(next(iter(energies.values())).blocks)
    figures = {
        "loss": loss_figure(comparison.rows),
        "blocks": blocks_figure(comparison.rows, depth),
        "energy": energy_figure(comparison.landscape, list(energies)),
        "states": states_figure(spectra, depth, len(energies)),
        "spectrum": spectrum_figure(spectra, tabu, len(energies)),
        "hessian": hessian_figure({name: found.hessian for name, found in energies.items()}),
    }
    for name, figure in figures.items():
        with replacing(folder / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    with replacing(folder / "comparison.csv") as temporary:
        write_csv(records(comparison.rows), temporary)
    with replacing(folder / "comparison.md") as temporary:
        temporary.write_text(table_of(comparison.rows).markdown())
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page(comparison, {name: folder / "figures" / f"{name}.png" for name in figures}))
    return folder / "report.html"


def energy_names(comparison: Comparison) -> list[str]:
    """The energies of a comparison: that of its settings, and the paper's."""
    return list(dict.fromkeys([comparison.settings["energy"], PAPER]))


def cells(row: Row, original: Row) -> list[str]:
    """A row as text, in the order of the headings; speed relative to the original of the same goal."""
    several = row.method == RANDOM and not row.removed
    blocks = "several draws" if several else ranges(row.removed)
    merged = " merged " + " ".join(f"{lo}-{hi}" for lo, hi in row.windows) if row.windows else ""
    return [
        row.goal,
        row.method,
        f"{row.perplexity:.4g}",
        f"{row.loss:.4f}",
        f"{row.kl:.4f}",
        f"{row.agreement:.1%}",
        f"{row.num_parameters / 1e6:.4g} M",
        f"{row.num_bytes / 1e6:.4g}",
        f"{row.tokens_per_second:,.0f} ({row.tokens_per_second / original.tokens_per_second:.2f}x)",
        *(score.as_text() for score in row.scores),
        f"{row.passes:.3g}",
        f"{row.seconds:.3g}",
        blocks + merged,
    ]


def headings(rows: Sequence[Row]) -> list[str]:
    """The names of the columns: those of every comparison, and the tasks of this one."""
    return [*_HEADINGS[:-3], *(score.task for score in rows[0].scores), *_HEADINGS[-3:]]


def text_rows(rows: Sequence[Row]) -> list[list[str]]:
    """The averaged rows as text; the original once for each goal."""
    shown = averaged(rows)
    originals = {row.goal: row for row in shown if row.method == ORIGINAL}
    return [cells(row, originals[row.goal]) for row in shown]


def table_of(rows: Sequence[Row]) -> Table:
    """Every column for all goals."""
    columns = [Column(heading, words=heading in ("goal", "method", "removed")) for heading in headings(rows)]
    return Table(columns, text_rows(rows), caption=AT_CHANCE if rows[0].scores else "")


def terminal_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each goal; what is left out here is in the files."""
    tasks = [score.task for score in rows[0].scores]
    shown = ["method", "perplexity", "KL", "top-1", "speed", *tasks, "passes", "seconds", "removed"]
    columns = [Column(heading, words=heading in ("method", "removed")) for heading in shown]
    marked = any(score.at_chance for row in rows for score in row.scores)

    lines: dict[str, list[list[str]]] = {}
    for cells in text_rows(rows):
        cell = dict(zip(headings(rows), cells, strict=True))
        cell["speed"] = cell["tokens/s"].partition("(")[2].rstrip(")")
        lines.setdefault(cell["goal"], []).append([cell[heading] for heading in shown])

    caption = AT_CHANCE if marked else ""
    return [Table(columns, own, title=f"remove {goal}", caption=caption) for goal, own in lines.items()]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every row with full digits, draws one by one; blocks and windows separated by spaces."""
    found = []
    for row in rows:
        record = {name: value for name, value in vars(row).items() if name != "scores"}
        record["removed"] = " ".join(map(str, row.removed))
        record["windows"] = " ".join(f"{lo}-{hi}" for lo, hi in row.windows)
        record["perplexity"] = row.perplexity
        record |= {score.task: score.value for score in row.scores}
        found.append(record)
    return found


def page(comparison: Comparison, figures: dict[str, Path]) -> str:
    """The HTML page; the figures are inside it."""
    body = ["<tr>" + "".join(f"<th>{h}</th>" for h in headings(comparison.rows)) + "</tr>"]
    for line in text_rows(comparison.rows):
        body.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>")
    parts = [f"<h1>Block removal: {html.escape(str(comparison.settings['model']))}</h1>", "<table>", *body, "</table>"]
    parts.append(
        "<p>Perplexity, loss (nats a token), KL divergence from the original and agreement with its most likely token "
        "on the evaluation text. Passes: the cost of the method in forward passes over the calibration samples.</p>"
    )
    if comparison.rows[0].scores:
        parts.append(f"<p>Scores of tasks in percent with standard errors; {AT_CHANCE}.</p>")
    parts += [f"<p>Left out: {html.escape(f'{k}: {v}')}</p>" for k, v in comparison.left_out.items()]
    for name, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        caption = html.escape(_CAPTIONS[name])
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    settings = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in comparison.settings.items())
    style = (
        "body{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 8px;text-align:right;white-space:nowrap}"
        "td:last-child,td:nth-child(2){text-align:left}tr:nth-child(even){background:#f3f3f3}figure{margin:2em 0}"
    )
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>blockspin</title><style>{style}</style>'
    return head + "\n".join([*parts, f"<h2>Settings</h2><ul>{settings}</ul></html>"]) + "\n"
