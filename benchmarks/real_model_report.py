"""The table and the figure of what `real_model.py` has measured: KL of each method's choice, draw by draw.

python benchmarks/real_model_report.py chat-*.json --figure docs/real_model.svg
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "blockspin"  # equal figures make equal files

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

OURS, BLUE, GREY = "blockspin", "#2563eb", "#9ca3af"
TEXTS = ("chat", "text")
SHOWN = 7  # methods in a panel, the best on chat first

# Number of removed blocks -> method -> draws of (KL on chat, KL on text)
Choices = dict[int, dict[str, list[tuple[float, ...]]]]


def read(paths: Sequence[Path]) -> Choices:
    """All choices in the files; energies are left out."""
    found: Choices = defaultdict(lambda: defaultdict(list))
    for path in sorted(paths):
        for label, rows in json.loads(path.read_text()).items():
            removed = int(label.split()[0].removeprefix("M="))
            for name, row in rows.items():
                if TEXTS[0] in row:
                    method = OURS if name.startswith(OURS) else name
                    found[removed][method].append(tuple(row[text][0] for text in TEXTS))
    return found


def ranked(methods: Mapping[str, list[tuple[float, ...]]]) -> list[str]:
    """The methods, the lowest mean on chat first."""
    return sorted(methods, key=lambda method: float(np.mean([draw[0] for draw in methods[method]])))


def table(choices: Choices) -> str:
    """Markdown: a line for each method, with the means over the draws and the draws."""
    lines = ["| removed | method | chat | text | draws on chat |", "|---|---|---|---|---|"]
    for removed, methods in sorted(choices.items()):
        for method in ranked(methods):
            draws = np.array(methods[method])  # (draws, texts)
            chat, text = draws.mean(axis=0)
            each = ", ".join(f"{value:.3f}" for value in draws[:, 0])
            lines.append(f"| {removed} | {method} | {chat:.3f} | {text:.3f} | {each} |")
    return "\n".join(lines)


def figure(choices: Choices) -> Figure:
    """A panel for each number of removed blocks: the mean on chat as a bar, the draws as dots."""
    drawn, panels = plt.subplots(1, len(choices), figsize=(4.6 * len(choices), 3.2), squeeze=False)
    for axes, (removed, methods) in zip(panels[0], sorted(choices.items()), strict=True):
        for place, method in enumerate(ranked(methods)[:SHOWN]):
            draws = [draw[0] for draw in methods[method]]
            axes.barh(place, np.mean(draws), color=BLUE if method == OURS else GREY, height=0.62)
            axes.plot(draws, [place] * len(draws), "o", color="#111827", markersize=3)
            axes.text(max(draws) * 1.02, place, f"{np.mean(draws):.2f}", va="center", fontsize=8)

        axes.set_yticks(range(min(SHOWN, len(methods))), ranked(methods)[:SHOWN], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{removed} of 30 blocks removed", fontsize=10)
        axes.set_xlabel("KL divergence from the original (nats a token)", fontsize=8)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files that real_model.py has written")
    parser.add_argument("--figure", type=Path, help="write the figure to this SVG file")
    arguments = parser.parse_args()
    choices = read(arguments.results)
    print(table(choices))
    if arguments.figure:
        figure(choices).savefig(arguments.figure, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
