"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from ..config import GRADIENT_ENERGIES
from ..solvers import Spectrum
from .run import Row, averaged

# The colours of Okabe and Ito, which stay apart under every common colour blindness; yellow is left out: too pale.
BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#000000",
)
_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK)
_MARKERS = "os^DvP*X"


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation of two series; equal values share their mean rank. NaN where one is constant or too short."""

    def ranks(values: ArrayLike) -> Any:
        _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    x, y = ranks(a), ranks(b)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else float("nan")


def hessian_figure(hessians: dict[str, Any]) -> Figure:
    """Heat maps of the energies' matrices, in red and blue; a scale ends at the 98th percentile off the diagonal.

    hessians: name of the energy -> (N, N).
    """
    figure, panels = _panels(hessians, 6.4, 5.4)
    for (name, matrix), axes in zip(hessians.items(), panels, strict=True):
        h = np.asarray(matrix)
        off = np.abs(h[~np.eye(len(h), dtype=bool)])
        scale = float(np.quantile(off, 0.98)) or float(np.abs(h).max()) or 1.0
        image = axes.imshow(h, cmap="RdBu_r", vmin=-scale, vmax=scale)
        unit = "nats²" if name in GRADIENT_ENERGIES else "nats"
        figure.colorbar(image, ax=axes, extend="both", label=f"energy ({unit})")
        axes.set(xlabel="block", ylabel="block", title=f"matrix of the energy: {name}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def states_figure(spectra: dict[str, Spectrum], depth: int, together: int = 1, states: int = 20) -> Figure:
    """For each spectrum a panel: state by state, the removed blocks; so many stay together in a line."""
    figure, panels = _panels(spectra, 0.16 * min(depth, 60) + 1.6, 4.4, together)
    for (title, spectrum), axes in zip(spectra.items(), panels, strict=True):
        shown = spectrum.states[:states]
        grid = np.array([[i in state.removed for i in range(depth)] for state in shown])
        _grid(axes, grid.astype(float), [BLUE])
        axes.set(xlabel="block", yticks=range(0, len(shown), 2))
        axes.set_title(title, fontsize=10)
        axes.set_yticklabels([f"CBO:{k}" for k in range(0, len(shown), 2)])
    return figure


def energy_figure(landscape: dict[str, list[dict[str, Any]]], energies: Sequence[str]) -> Figure:
    """For each goal and energy a panel: energy against the loss above the original's, with rank correlations."""
    keys = {f"remove {goal}, {name}": (goal, name) for goal in landscape for name in energies}
    figure, panels = _panels(keys, 4.6, 4.2, len(energies))
    for (title, (goal, name)), axes in zip(keys.items(), panels, strict=True):
        whole = next(p["loss"] for p in landscape[goal] if "original" in p["drawn"])
        points = {
            label: [(p["energies"][name], p["loss"] - whole) for p in landscape[goal] if drawn in p["drawn"]]
            for label, drawn in (("its lowest states", name), ("random removals", "random"))
        }
        for (label, chosen), colour, marker in zip(points.items(), (BLUE, ORANGE), "o^", strict=True):
            if chosen:
                x, y = zip(*chosen, strict=True)
                axes.scatter(x, y, s=18, color=colour, marker=marker, label=f"{label}, ρ = {spearman(x, y):.2f}")
        x, y = zip(*(point for chosen in points.values() for point in chosen), strict=True)
        _logarithmic(axes, x, y)
        axes.set(xlabel="energy", ylabel="loss above the original's (nats)")
        axes.set_title(f"{title}: ρ = {spearman(x, y):.2f} in all", fontsize=10)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), fontsize=8, frameon=False)
        axes.grid(alpha=0.3)
    return figure


def _logarithmic(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Logarithmic axes where they can be; where a removal lowers the loss, below 0.01 nats it is linear."""
    if 0 < 3 * min(x) < max(x):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="x", scilimits=(-2, 3))
    if min(y) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(min(y) - 0.003, 2 * max(y))


def spectrum_figure(spectra: dict[str, Spectrum], tabu: dict[str, Spectrum], together: int = 1) -> Figure:
    """For each spectrum a panel: energy by state, certified and by tabu search; so many stay together in a line."""
    figure, panels = _panels(spectra, 4.6, 3.8, together)
    for title, axes in zip(spectra, panels, strict=True):
        exact, found = spectra[title], tabu[title]
        proven = f"{exact.solver}, {exact.num_proven} of {len(exact.states)} proven"
        axes.plot([s.energy for s in exact.states], color=BLACK, lw=1.5, label=proven)
        axes.plot([s.energy for s in found.states], "o", color=ORANGE, ms=3, mfc="none", label="tabu search")
        missed = len({s.removed for s in exact.states} - {s.removed for s in found.states})
        axes.set(xlabel="state k", ylabel="energy")
        axes.set_title(f"{title}: tabu misses {missed} of {len(exact.states)}", fontsize=9, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-2, 3))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=8, frameon=False)
        axes.grid(alpha=0.3)
    return figure


def loss_figure(rows: Sequence[Row]) -> Figure:
    """A line per method: increase of the loss (log scale) against the share of the parameters that is gone."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axes = figure.add_subplot()
    shown = averaged(rows)
    original = next(row for row in shown if row.method == "original")
    names = [row.method for row in sorted(shown, key=lambda row: (-_gone(row, original), row.loss))]
    for place, name in enumerate(dict.fromkeys(n for n in names if n != "original")):
        points = sorted(
            (_gone(row, original), max(row.loss - original.loss, 1e-4)) for row in shown if row.method == name
        )
        ours = name.startswith("CBO")
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=_COLOURS[place % len(_COLOURS)],
            marker=_MARKERS[place % len(_MARKERS)],
            lw=2.4 if ours else 1.2,
            ls="-" if ours else "--",
            ms=6,
        )
    axes.set(yscale="log", xlabel="parameters removed (%)", ylabel="loss above the original's (nats, log scale)")
    axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=9, title="lowest loss first")
    return figure


def blocks_figure(rows: Sequence[Row], depth: int) -> Figure:
    """For each goal a panel: the methods as rows, removed blocks filled; blocks that hold merged weights in green."""
    shown = [row for row in averaged(rows) if row.removed]
    goals = list(dict.fromkeys(row.goal for row in shown))
    groups = {goal: [row for row in shown if row.goal == goal] for goal in goals}
    longest = max(len(group) for group in groups.values())
    figure, panels = _panels(groups, 0.16 * min(depth, 60) + 2.8, 0.24 * longest + 1.2)
    for (goal, group), axes in zip(groups.items(), panels, strict=True):
        grid = np.zeros((len(group), depth))
        for line, row in enumerate(group):
            grid[line, list(row.removed)] = 1
            grid[line, [lo for lo, _ in row.windows]] = 2
        _grid(axes, grid, [BLUE, GREEN])
        axes.set(xlabel="block", title=f"remove {goal}", yticks=range(len(group)))
        axes.set_yticklabels([f"{row.method}  {row.loss:.3f}" for row in group], fontsize=8)
    handles = [Patch(color=BLUE, label="removed"), Patch(color=GREEN, label="holds merged weights")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _gone(row: Row, original: Row) -> float:
    return 100 * (1 - row.num_parameters / original.num_parameters)


def _panels(groups: dict[str, Any], width: float, height: float, multiple: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each group; in a line as many as fit on 15 inches, a multiple of `multiple`."""
    fitting = max(1, min(int(15 / width), len(groups)))
    columns = max(multiple, fitting - fitting % multiple)
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, [figure.add_subplot(lines, columns, k + 1) for k in range(len(groups))]


def _grid(axes: Axes, grid: Any, colours: Sequence[str]) -> None:
    """Cells with white lines between them: 0 is pale, k the k-th colour."""
    rows, columns = (np.arange(size + 1) - 0.5 for size in grid.shape)
    axes.pcolormesh(
        columns, rows, grid, cmap=ListedColormap(["#EEEEEE", *colours]), vmin=0, vmax=len(colours), ec="white", lw=0.6
    )
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
