"""The figures of a comparison. Each function returns one; panels stand side by side where they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from ..config import GRADIENT_ENERGIES
from ..page import BLACK, BLUE, LINE, MUTE, PALE
from ..problem import rows_of
from ..solvers import Spectrum
from .results import ORIGINAL, RANDOM, SELECTED, LandscapePoint, Row, averaged, goal_title

# The colours of Okabe and Ito, which stay apart under every common colour blindness; yellow is left out: too pale.
ORANGE, GREEN, RED, SKY, PINK = "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
NAMED = 3  # other methods that get a colour
TOP = 3.0  # times the worst of those is where the axis ends
OBJECTIVES = {
    "kl": "KL divergence from the original (nats a token)",
    "loss": "loss above the original's (nats a token)",
}
COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK)
MARKERS = "os^DvP*X"

PAGE = 15.0  # inches that panels side by side may take
CELL = 0.16  # inches of a block in a grid
MOST_CELLS = 60  # blocks beyond which the cells get narrower
LEAST_LOSS = 1e-4  # nats; smaller increases of the loss are drawn there, as the axis is logarithmic
LINEAR_BELOW = 0.01  # nats; where a removal lowers the loss, the axis is linear below this


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two series; equal values share their mean rank. NaN where one is constant or too short."""
    if not (np.ptp(a) and np.ptp(b)):
        return float("nan")
    return float(spearmanr(a, b).statistic)


def hessian_figure(hessians: Mapping[str, NDArray[np.float64]], noun: str = "blocks") -> Figure:
    """Heat maps of the energies' matrices, in red and blue; a scale ends at the 98th percentile off the diagonal.

    hessians: name of the energy -> (N, N). noun: what its rows stand for.
    """
    figure, panels = _panels(len(hessians), 6.4, 5.4)
    for (name, hessian), axes in zip(hessians.items(), panels, strict=True):
        # A few blocks that cannot go at all would leave all others white.
        off_diagonal = np.abs(hessian[~np.eye(len(hessian), dtype=bool)])
        scale = float(np.quantile(off_diagonal, 0.98)) or float(np.abs(hessian).max()) or 1.0
        image = axes.imshow(hessian, cmap="RdBu_r", vmin=-scale, vmax=scale)

        unit = "nats"
        if name in GRADIENT_ENERGIES:
            unit = "nats²"
        elif name.startswith("fitted"):
            unit = "of log KL"
        figure.colorbar(image, ax=axes, extend="both", label=f"energy ({unit})")
        axes.set(xlabel=noun, ylabel=noun, title=f"matrix of the energy: {name}")
        _count(axes.xaxis)
        _count(axes.yaxis)
    return figure


def states_figure(
    spectra: Mapping[str, Spectrum], depth: int, together: int = 1, states: int = 20, noun: str = "blocks"
) -> Figure:
    """For each spectrum a panel: state by state, what is removed of so many units; so many panels stay together."""
    figure, panels = _panels(len(spectra), _grid_width(depth) + 1.6, 4.4, together)
    for (title, spectrum), axes in zip(spectra.items(), panels, strict=True):
        shown = spectrum.states[:states]
        grid = rows_of([state.removed for state in shown], depth)  # (states, depth)
        _draw_grid(axes, grid.astype(np.float64), [BLUE])

        labelled = range(0, len(shown), 2)
        axes.set(xlabel=noun, yticks=labelled)
        axes.set_title(title, fontsize=10)
        axes.set_yticklabels([f"CBO:{k}" for k in labelled])
    return figure


def energy_figure(landscape: Mapping[str, Sequence[LandscapePoint]], energies: Sequence[str]) -> Figure:
    """For each goal and energy a panel: energy against the loss above the original's, with rank correlations."""
    figure, panels = _panels(len(landscape) * len(energies), 4.6, 4.2, len(energies))
    free = iter(panels)
    for goal, points in landscape.items():
        for name in energies:
            _draw_landscape(next(free), points, name, f"{goal_title(goal)}, {name}")
    return figure


def _draw_landscape(axes: Axes, points: Sequence[LandscapePoint], energy: str, title: str) -> None:
    """The low states of an energy and the random removals, each with its own rank correlation."""
    whole = next(point.loss for point in points if ORIGINAL in point.drawn)
    all_x: list[float] = []
    all_y: list[float] = []
    groups = (("its lowest states", energy, BLUE, "o"), ("random removals", RANDOM, ORANGE, "^"))
    for label, drawn, colour, marker in groups:
        group = [point for point in points if drawn in point.drawn]
        if not group:
            continue
        x = [point.energies[energy] for point in group]
        y = [point.loss - whole for point in group]
        axes.scatter(x, y, s=18, color=colour, marker=marker, label=f"{label}, ρ = {spearman(x, y):.2f}")
        all_x += x
        all_y += y

    _logarithmic(axes, all_x, all_y)
    axes.set(xlabel="energy", ylabel="loss above the original's (nats)")
    axes.set_title(f"{title}: ρ = {spearman(all_x, all_y):.2f} in all", fontsize=10)
    _legend_below(axes)
    axes.grid(alpha=0.3)


def _logarithmic(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Logarithmic axes where they can be; where a removal lowers the loss, near zero it is linear."""
    if 0 < 3 * min(x) < max(x):
        axes.set_xscale("log")
        _label_one_two_five(axes.xaxis)
    else:
        axes.ticklabel_format(axis="x", scilimits=(-2, 3))

    if min(y) > 0:
        axes.set_yscale("log")
        _label_one_two_five(axes.yaxis)
    else:
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axes.set_ylim(min(y) - 0.003, 2 * max(y))


def spectrum_figure(spectra: Mapping[str, Spectrum], tabu: Mapping[str, Spectrum], together: int = 1) -> Figure:
    """For each spectrum a panel: energy by state, certified and by tabu search; so many stay together in a line."""
    figure, panels = _panels(len(spectra), 4.6, 3.8, together)
    for title, axes in zip(spectra, panels, strict=True):
        exact, found = spectra[title], tabu[title]
        proven = f"{exact.solver}, {exact.num_proven} of {len(exact.states)} proven"
        axes.plot([state.energy for state in exact.states], color=BLACK, lw=1.5, label=proven)
        axes.plot([state.energy for state in found.states], "o", color=ORANGE, ms=3, mfc="none", label="tabu search")

        missed = {state.removed for state in exact.states} - {state.removed for state in found.states}
        axes.set(xlabel="state k", ylabel="energy")
        axes.set_title(f"{title}: tabu misses {len(missed)} of {len(exact.states)}", fontsize=9, loc="right")
        _count(axes.xaxis)
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
        _legend_below(axes, columns=2)
        axes.grid(alpha=0.3)
    return figure


def quality_figure(rows: Sequence[Row], objective: str, *, narrow: bool = False) -> Figure:
    """The objective against the share of the parameters that is gone, with standard errors, both methods and goals.

    Ours and the best others have a colour each; the rest is pale, so that the picture can be read.
    """
    shown = [row for row in averaged(rows) if row.method != ORIGINAL]
    original = next(row for row in rows if row.method == ORIGINAL)
    if len({row.goal for row in shown}) == 1:
        return ranking_figure(shown, original, objective, narrow=narrow)
    coloured = named_in_figure(shown, original, objective)

    figure = Figure(figsize=(4.4, 4.7) if narrow else (8.4, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(row.method for row in shown):
        own = sorted((row for row in shown if row.method == method), key=lambda row: _percent_gone(row, original))
        values = [row.measured(objective, original) for row in own]
        x = [_percent_gone(row, original) for row in own]
        y = [max(value, LEAST_LOSS) for value, _ in values]
        if method not in coloured:
            axes.plot(x, y, color=MUTE, lw=0.9, marker=".", ms=4, zorder=1)
            continue

        place, ours = coloured.index(method), method == SELECTED
        errors = [error or 0.0 for _, error in values]
        axes.errorbar(
            x,
            y,
            # The axis is logarithmic: an error below zero ends at a tenth of the value.
            yerr=np.array([np.minimum(errors, 0.9 * np.array(y)), errors]),  # (2, goals) below and above
            label=method,
            color=COLOURS[place],
            marker=MARKERS[place],
            lw=2.6 if ours else 1.5,
            ms=7 if ours else 5,
            capsize=3,
            zorder=3 if ours else 2,
        )

    if len(coloured) < len({row.method for row in shown}):
        axes.plot([], [], color=MUTE, lw=0.9, marker=".", ms=4, label="other methods")
    axes.set(yscale="log", xlabel="parameters removed (%)", ylabel=OBJECTIVES[objective])
    _label_one_two_five(axes.yaxis)
    axes.grid(color=LINE, lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)

    # What is far worse than all that have a colour would press those together.
    worst = max(row.measured(objective, original)[0] for row in shown if row.method in coloured)
    axes.set_ylim(top=min(axes.get_ylim()[1], TOP * max(worst, LEAST_LOSS)))

    handles, labels = axes.get_legend_handles_labels()
    ordered = sorted(zip(labels, handles, strict=True), key=lambda pair: ([*coloured, pair[0]]).index(pair[0]))
    figure.legend(
        [handle for _, handle in ordered],
        [label for label, _ in ordered],
        loc="outside lower center",
        ncols=2 if narrow else len(ordered),
        fontsize=9.5,
        frameon=False,
    )
    return figure


def ranking_figure(shown: Sequence[Row], original: Row, objective: str, *, narrow: bool = False) -> Figure:
    """Of a single goal: the methods one below the other, the lowest objective first, with standard errors."""
    ranked = sorted(shown, key=lambda row: row.measured(objective, original)[0])
    figure = Figure(figsize=(4.4 if narrow else 8.4, 0.26 * len(ranked) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    for line, row in enumerate(ranked):
        value, error = row.measured(objective, original)
        value, ours = max(value, LEAST_LOSS), row.is_ours
        below = min(error or 0.0, 0.9 * value)  # the axis is logarithmic
        axes.errorbar(
            value,
            line,
            xerr=np.array([[below], [error or 0.0]]),
            fmt="o",
            color=BLUE if ours else MUTE,
            ms=8 if ours else 5,
            capsize=3,
        )

    axes.set(xscale="log", xlabel=OBJECTIVES[objective], yticks=range(len(ranked)))
    axes.set_yticklabels([row.method for row in ranked], fontsize=9)
    axes.invert_yaxis()
    _label_one_two_five(axes.xaxis)
    axes.grid(color=LINE, lw=0.8, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def named_in_figure(shown: Sequence[Row], original: Row, objective: str) -> list[str]:
    """The methods that get a colour: ours first, then the best others by their mean rank over the goals."""
    ranks: dict[str, list[int]] = {}
    for goal in dict.fromkeys(row.goal for row in shown):
        own = [row for row in shown if row.goal == goal]
        for rank, row in enumerate(sorted(own, key=lambda row: row.measured(objective, original)[0])):
            ranks.setdefault(row.method, []).append(rank)

    # A method that is missing for a goal counts as the last there.
    goals, last = max(map(len, ranks.values())), len(ranks)
    for places in ranks.values():
        places += [last] * (goals - len(places))
    order = sorted(ranks, key=lambda method: sum(ranks[method]))
    ours = [method for method in order if method == SELECTED]
    others = [method for method in order if not method.startswith("CBO")]
    return [*ours, *others[:NAMED]]


def _percent_gone(row: Row, original: Row) -> float:
    """Parameters that a row lacks, in percent of the original's."""
    return 100 * (1 - row.num_parameters / original.num_parameters)


def _panels(number: int, width: float, height: float, multiple: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, in inches; in a line as many as fit on the page, a multiple of `multiple`."""
    fitting = max(1, min(int(PAGE / width), number))
    columns = max(multiple, fitting - fitting % multiple)
    lines = -(-number // columns)  # rounded up
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, [figure.add_subplot(lines, columns, k + 1) for k in range(number)]


def _grid_width(depth: int) -> float:
    """The inches that a line of blocks takes."""
    return CELL * min(depth, MOST_CELLS)


def _draw_grid(axes: Axes, grid: NDArray[np.float64], colours: Sequence[str]) -> None:
    """Cells with white lines between them: 0 is pale, k the k-th colour. grid: (lines, num_blocks)."""
    lines, columns = grid.shape
    axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(lines + 1) - 0.5,
        grid,
        cmap=ListedColormap([PALE, *colours]),
        vmin=0,
        vmax=len(colours),
        ec="white",
        lw=0.6,
    )
    axes.invert_yaxis()
    _count(axes.xaxis)


def _count(axis: Axis) -> None:
    """Ticks at whole numbers."""
    axis.set_major_locator(MaxNLocator(integer=True))


def _legend_below(axes: Axes, columns: int = 1) -> None:
    """The legend under the label of the x axis, where it hides no points."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, fontsize=8, frameon=False)


def _label_one_two_five(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axis.set_minor_formatter(NullFormatter())
