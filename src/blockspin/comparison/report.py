"""A comparison as tables and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..energies import load_energies
from ..evaluation.scores import AT_CHANCE
from ..files import replacing
from ..solvers import Spectrum
from ..tables import Column, Table, ranges, write_csv
from .figures import blocks_figure, energy_figure, hessian_figure, loss_figure, spectrum_figure, states_figure
from .methods import PAPER
from .results import ORIGINAL, Comparison, Row, averaged

RESOLUTION = 130  # dots per inch of the figures

_WORDS = ("goal", "method", "blocks")  # columns that hold no numbers
_CAPTIONS = {
    "loss": "Loss on the evaluation text, above the original's, against the share of the parameters that is gone.",
    "blocks": "The blocks that each method removes, best loss first.",
    "energy": "Energy against measured loss: the lowest states of each energy and random removals. "
    "rho is Spearman's rank correlation: does the energy order removals as their measured loss does?",
    "states": "Which blocks the states of lowest energy remove.",
    "spectrum": "The energies of the lowest states: certified, and as tabu search finds them.",
    "hessian": "The matrices of the energies. An entry off the diagonal says that two blocks cost more (red) or less "
    "(blue) together than apart.",
}
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:2px 8px;text-align:right;white-space:nowrap}"
    "td:last-child,td:nth-child(2){text-align:left}tr:nth-child(even){background:#f3f3f3}figure{margin:2em 0}"
)
_EXPLANATION = (
    "Perplexity, loss (nats a token), KL divergence from the original and agreement with its most likely token "
    "on the evaluation text. Passes: the cost of the method in forward passes over the calibration samples."
)


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

    images = {}
    for name, figure in draw_figures(comparison, folder).items():
        images[name] = folder / "figures" / f"{name}.png"
        with replacing(images[name]) as temporary:
            figure.savefig(temporary, format="png", dpi=RESOLUTION, bbox_inches="tight")

    with replacing(folder / "comparison.csv") as temporary:
        write_csv(records(comparison.rows), temporary)
    with replacing(folder / "comparison.md") as temporary:
        temporary.write_text(table_of(comparison.rows).markdown())
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page(comparison, images))
    return folder / "report.html"


def draw_figures(comparison: Comparison, folder: Path) -> dict[str, Figure]:
    """Every figure by name, in the order of the page. folder: where the energies and spectra lie."""
    names = list(dict.fromkeys([comparison.settings["energy"], PAPER]))  # one, if ours is the paper's
    hessians = {}
    for name in names:
        energies = load_energies(folder / f"{name}.safetensors")
        hessians[name] = energies.hessian
    depth = len(energies.blocks)

    # A panel for each goal and energy; those of one goal stay together.
    spectra, tabu = {}, {}
    for goal in comparison.landscape:
        for name in names:
            panel = f"remove {goal}, {name}"
            spectra[panel] = Spectrum.load(folder / f"spectrum-{goal}-{name}.json")
            tabu[panel] = Spectrum.load(folder / f"spectrum-{goal}-{name}-tabu.json")

    return {
        "loss": loss_figure(comparison.rows),
        "blocks": blocks_figure(comparison.rows, depth),
        "energy": energy_figure(comparison.landscape, names),
        "states": states_figure(spectra, depth, len(names)),
        "spectrum": spectrum_figure(spectra, tabu, len(names)),
        "hessian": hessian_figure(hessians),
    }


def text_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """The averaged rows as text, by the names of the columns; the original once for each goal."""
    lines = []
    for row in averaged(rows):
        if row.method == ORIGINAL:  # the first of its goal
            original = row
        lines.append(cells(row, original))
    return lines


def cells(row: Row, original: Row) -> dict[str, str]:
    """A row as text; "speed" is relative to the original of the same goal, and part of "tokens/s" as well."""
    speed = f"{row.tokens_per_second / original.tokens_per_second:.2f}x"
    blocks = ranges(row.removed)
    if row.windows:
        blocks += " merged " + _windows_text(row)
    elif not row.removed and row.method != ORIGINAL:
        blocks = "several draws"

    scores = {score.task: score.as_text() for score in row.scores}
    return {
        "goal": row.goal,
        "method": row.method,
        "removed": str(len(row.removed)) if row.removed else "",
        "perplexity": f"{row.perplexity:.4g}",
        "loss above": f"{row.loss - original.loss:.4f}{_plus_minus(row.above_error)}",
        "KL": f"{row.kl:.4f}{_plus_minus(row.kl_error)}",
        "top-1": f"{row.agreement:.1%}",
        "parameters": f"{row.num_parameters / 1e6:.4g} M",
        "MB": f"{row.num_bytes / 1e6:.4g}",
        "tokens/s": f"{row.tokens_per_second:,.0f} ({speed})",
        "speed": speed,
        **scores,
        "passes": f"{row.passes:.3g}",
        "seconds": f"{row.seconds:.3g}",
        "blocks": blocks,
    }


def _plus_minus(error: float | None) -> str:
    """A standard error behind a number; nothing where there is none, as of the original."""
    return f" ±{error:.4f}" if error else ""


def table_of(rows: Sequence[Row]) -> Table:
    """Every column for all goals."""
    lines = text_rows(rows)
    shown = [heading for heading in lines[0] if heading != "speed"]
    return _table(lines, shown, caption=AT_CHANCE if rows[0].scores else "")


def terminal_tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each goal; what is left out here is in the files."""
    tasks = [score.task for score in rows[0].scores]
    shown = ["method", "removed", "perplexity", "KL", "top-1", "speed", *tasks, "passes", "seconds", "blocks"]
    marked = any(score.at_chance for row in rows for score in row.scores)

    goals: dict[str, list[dict[str, str]]] = {}
    for line in text_rows(rows):
        goals.setdefault(line["goal"], []).append(line)

    tables = []
    for goal, lines in goals.items():
        tables.append(_table(lines, shown, f"remove {goal}", AT_CHANCE if marked else ""))
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


def page(comparison: Comparison, images: Mapping[str, Path]) -> str:
    """The HTML page; the images are inside it."""
    title = html.escape(f"Block removal: {comparison.settings['model']}")
    parts = [f"<h1>{title}</h1>", _html_table(table_of(comparison.rows)), f"<p>{_EXPLANATION}</p>"]
    if comparison.rows[0].scores:
        parts.append(f"<p>Scores of tasks in percent with standard errors; {AT_CHANCE}.</p>")
    for name, reason in comparison.left_out.items():
        parts.append(f"<p>{html.escape(f'Left out: {name}: {reason}')}</p>")

    for name, path in images.items():
        data = base64.b64encode(path.read_bytes()).decode()
        caption = html.escape(_CAPTIONS[name])
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")

    parts.append("<h2>Settings</h2><ul>")
    for name, value in comparison.settings.items():
        parts.append(f"<li>{html.escape(f'{name}: {value}')}</li>")
    parts.append("</ul></html>")

    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>blockspin</title><style>{_STYLE}</style>'
    return "\n".join([head, *parts]) + "\n"


def _html_table(table: Table) -> str:
    """Headings and rows; the caption is left to the page."""
    headings = "".join(f"<th>{html.escape(column.heading)}</th>" for column in table.columns)
    lines = ["<table>", f"<tr>{headings}</tr>"]
    for row in table.rows:
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    lines.append("</table>")
    return "\n".join(lines)
