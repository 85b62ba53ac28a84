"""Tables and the figure of `retraining.py`, from the rows of its parts.

    python benchmarks/retraining_report.py results --figure docs/retraining.svg > tables.md

The added loss is the cross-entropy above the original's, and the recovered share is how much of what the plain removal
adds is gone. ± is a standard error over windows: of a share by bootstrap, of a difference from the paired windows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from retraining import LEAST, STARTS
from retraining_bench import CONVERSATIONS, FIRST, MOST, SOME, THIRD_OWN, read_rows

from blockspin.comparison.figures import COLOURS, MARKERS, spearman
from blockspin.scatter import plus_minus, standard_error
from blockspin.tables import Column, Table, ranges

Floats = NDArray[np.float64]
TEXTS = {"chat": "chat", "text": "other text"}
DRAWS = 1000
NO_CHANGES = ("main", "ours", "plain Trainer", "crossed", "predict")  # names of runs


@dataclass(frozen=True)
class Results:
    """All rows of all parts."""

    rows: list[dict[str, Any]]

    def where(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows of runs with these values, the best on the validation windows first."""
        found = []
        for row in self.rows:
            if all(row["run"][name] == value for name, value in wanted.items()):
                found.append(row)
        return sorted(found, key=lambda row: row.get("validation", 0.0))

    def values(self, text: str, measure: str, **wanted: Any) -> Floats | None:
        """(windows,) of the best run with these values, the mean over its seeds; None where there is none."""
        found = self.where(**wanted)
        if not found:
            return None
        rate = found[0]["run"]["rate"]
        seeds = [row[text][measure] for row in found if row["run"]["rate"] == rate]
        return np.asarray(np.mean(seeds, axis=0))


def read(folder: Path) -> Results:
    """The rows of all parts, each run once: parts may share some."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_rows(path):
            found.setdefault(str(row["run"]), row)
    return Results(list(found.values()))


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column holds words."""
    return Table([Column(heading, words=not number) for number, heading in enumerate(headings)], lines).markdown()


def share(added: Floats, plain: Floats) -> tuple[float, float]:
    """The recovered share of the added loss and its standard error; added, plain: (windows,) above the original."""
    drawn = np.random.default_rng(0).integers(0, len(added), (DRAWS, len(added)))  # (draws, windows)
    shares = 1 - added[drawn].mean(1) / plain[drawn].mean(1)
    return float(1 - added.mean() / plain.mean()), float(shares.std())


def with_error(values: Floats) -> str:
    """The mean over windows and its standard error."""
    return f"{values.mean():.3f}{plus_minus(standard_error(values), digits=3)}"


def recovered(results: Results, goal: str, text: str) -> Iterator[tuple[str, bool, int, float, float]]:
    """(method, repaired, tokens, share, standard error) of every run of a goal."""
    for method in STARTS:
        start = {"name": "main", "start": [goal, method]}
        plain = results.where(**start, tokens=0, repaired=False)
        if not plain:
            continue
        original = np.array(plain[0]["original"][text]["loss"])
        worst = np.array(plain[0][text]["loss"]) - original
        for repaired in (True, False):
            for tokens in sorted({row["run"]["tokens"] for row in results.where(**start, repaired=repaired)}):
                loss = results.values(text, "loss", **start, repaired=repaired, tokens=tokens)
                assert loss is not None
                yield method, repaired, tokens, *share(loss - original, worst)


def of_starts(results: Results, goal: str) -> str:
    """The table of a goal: from each start, after each number of tokens."""
    cells = []
    shares = {text: {row[:3]: row[3:] for row in recovered(results, goal, text)} for text in TEXTS}
    for method, repaired, tokens in shares["chat"]:
        wanted = {"name": "main", "start": [goal, method], "repaired": repaired, "tokens": tokens}
        rows = results.where(**wanted)
        line = [method, "repaired" if repaired else "plain", f"{tokens:,}"]
        line.append(f"{rows[0]['run']['rate']:.1e}" if tokens else "")
        for text in TEXTS:
            loss, kl = results.values(text, "loss", **wanted), results.values(text, "kl", **wanted)
            assert loss is not None
            assert kl is not None
            value, error = shares[text][method, repaired, tokens]
            line += [with_error(kl), f"{np.exp(loss.mean()):.2f}", f"{value:.1%} ±{error:.1%}"]
        cells.append(line)
    headings = ["start", "", "tokens", "rate"]
    for title in TEXTS.values():
        headings += [f"KL, {title}", "perplexity", "recovered"]
    return markdown(headings, cells)


def against_plain_influence(results: Results, goal: str) -> str:
    """How far the first start is below a plain block influence, after as many tokens; paired by windows."""
    lines = []
    theirs = {"name": "main", "start": [goal, STARTS[1]], "repaired": False}
    for repaired in (True, False):
        ours = {"name": "main", "start": [goal, STARTS[0]], "repaired": repaired}
        for tokens in sorted({row["run"]["tokens"] for row in results.where(**ours)}):
            if not results.where(**theirs, tokens=tokens):
                continue
            line = [f"{STARTS[0]}, {'repaired' if repaired else 'plain'}", f"{tokens:,}"]
            for text in TEXTS:
                for measure in ("kl", "loss"):
                    a = results.values(text, measure, **ours, tokens=tokens)
                    b = results.values(text, measure, **theirs, tokens=tokens)
                    assert a is not None
                    assert b is not None
                    line.append(with_error(b - a))
            lines.append(line)
    return markdown(
        ["below a plain block influence", "tokens", "KL, chat", "loss, chat", "KL, other", "loss, other"], lines
    )


def of_changes(results: Results) -> str:
    """The table of changes of the recipe: KL, and how far it is above the recipe as it is."""
    rows = [row for row in results.where(start=list(FIRST)) if row["run"]["name"] not in NO_CHANGES]
    known = results.where(name="as it is", seed=0)
    lines = []
    for row in rows:
        run = row["run"]
        line = [run["name"], f"{run['rate']:.1e}", str(run["seed"]), f"{row['validation']:.4f}"]
        for text in TEXTS:
            found = np.array(row[text]["kl"])
            line += [with_error(found), with_error(found - known[0][text]["kl"]) if known else ""]
        lines.append(line)
    headings = ["change", "rate", "seed", "KL, validation", "KL, chat", "above", "KL, other text", "above"]
    return markdown(headings, lines)


def of_crossed(results: Results) -> str:
    """Each start with the text of the other: how much the repair brings, and how much the text."""
    lines = []
    for method in STARTS[:2]:
        for repaired in (True, False):
            for text in (THIRD_OWN, CONVERSATIONS):
                wanted = {"start": [FIRST[0], method], "repaired": repaired, "text": text, "tokens": MOST, "seed": 0}
                rows = results.where(**wanted)
                if rows:
                    kls = [with_error(np.array(rows[0][kind]["kl"])) for kind in TEXTS]
                    lines.append([method, "repaired" if repaired else "plain", text, *kls])
    return markdown(["start", "", "text of the training", *(f"KL, {title}" for title in TEXTS.values())], lines)


def of_predictors(results: Results) -> str:
    """After some and after most tokens."""
    return "\n\n".join(predictors(results, tokens) for tokens in (SOME, MOST))


def predictors(results: Results, tokens: int) -> str:
    """Rank correlations over removals with the KL after training, from each thing that is known before."""
    before: dict[str, Callable[[dict[str, Any]], bool]] = {
        "plain": lambda run: not run["tokens"] and not run["repaired"],
        "repaired": lambda run: not run["tokens"] and run["repaired"],
        "plain, 50 short steps": lambda run: run["batch"] == 1 and not run["repaired"],
        "repaired, 50 short steps": lambda run: run["batch"] == 1 and run["repaired"],
    }

    lines = []
    for name, is_it in before.items() if results.where(name="predict", tokens=tokens) else ():
        line = [name]
        for text in TEXTS:
            known, later = {}, {}
            for row in results.where(name="predict"):
                number, kl = row["run"]["start"][1], float(np.mean(row[text]["kl"]))
                if is_it(row["run"]):
                    known[number] = kl
                if row["run"]["tokens"] == tokens:
                    later[number] = kl

            both = sorted(known.keys() & later.keys())
            line.append(f"{spearman([known[n] for n in both], [later[n] for n in both]):.2f} of {len(both)}")
        lines.append(line)
    return markdown([f"KL before {tokens:,} tokens", *TEXTS.values()], lines)


def of_speed(results: Results) -> str:
    """Tokens/s of ours and of a plain Trainer, the median of the turns."""
    lines = []
    for batch in sorted({row["run"]["batch"] for row in results.where(name="plain Trainer")}):
        speeds = []
        for name in ("ours", "plain Trainer"):
            speeds.append(np.median([row["tokens_per_second"] for row in results.where(name=name, batch=batch)]))
        lines.append([str(batch), *(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}"])
    return markdown(["windows a step", "ours", "plain Trainer", "ratio"], lines)


def figure(results: Results, goal: str) -> Figure:
    """The recovered share against tokens, repaired starts hollow with solid lines, plain ones dashed."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (text, title) in zip(drawn.subplots(1, 2, sharey=True), TEXTS.items(), strict=True):
        points = list(recovered(results, goal, text))
        for colour, marker, method in zip(COLOURS, MARKERS, STARTS, strict=False):
            for repaired, style in ((True, "-"), (False, "--")):
                own = [point[2:] for point in points if point[:2] == (method, repaired)]
                if own:
                    tokens, shares, errors = (np.array(column) for column in zip(*own, strict=True))
                    label = f"{method}, {'repaired' if repaired else 'plain'}"
                    inside = "white" if repaired else colour
                    axes.errorbar(
                        tokens, shares, errors, color=colour, marker=marker, mfc=inside, ls=style, label=label
                    )
        axes.set(title=f"{title}, {goal} of 30 blocks", xlabel="tokens")
        axes.set_xscale("symlog", linthresh=LEAST)
        measured = sorted({tokens for _, _, tokens, *_ in points})
        axes.set_xticks(measured, [f"{tokens:,}" for tokens in measured])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(color="#E3E6EA")
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    drawn.axes[0].set_ylabel("recovered share of the added loss")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    results = read(arguments.results)

    for row in results.where(name="main", tokens=0, repaired=True):
        print(*row["run"]["start"], ranges(row["removed"]), sep=": ")
    for goal in ("8", "4"):
        if results.where(start=[goal, STARTS[0]], name="main"):
            print(f"\n## {goal} blocks\n\n{of_starts(results, goal)}\n\n{against_plain_influence(results, goal)}")
    tables = {"Crossed": of_crossed, "Changes": of_changes, "Predictors": of_predictors, "Speed": of_speed}
    for title, table in tables.items():
        print(f"\n## {title}\n\n{table(results)}")

    if arguments.figure:
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "retraining"}):
            figure(results, FIRST[0]).savefig(arguments.figure, metadata={"Date": None})


if __name__ == "__main__":
    main()
