"""The comparison on a tiny model: what is measured, what it costs, resuming, its tables and its page."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import Command, random_samples, save_tiny, tiny_model

from blockspin import baselines
from blockspin.comparison.cost import counted
from blockspin.comparison.figures import spearman
from blockspin.comparison.methods import Case, Method, methods
from blockspin.comparison.repairs import repairs_tables
from blockspin.comparison.report import terminal_tables, text_rows, write_report
from blockspin.comparison.results import Comparison, Row, averaged
from blockspin.comparison.run import compare
from blockspin.config import CompressConfig
from blockspin.data.calibration import load_calibration
from blockspin.energies.gradients import estimate_gradients
from blockspin.journal import Journal
from blockspin.model.batches import make_batches
from blockspin.model.head import split_model
from blockspin.model.losses import mean_loss
from blockspin.model.tracing import skipped, trace_model
from blockspin.repairs.run import repair
from blockspin.solvers.candidates import Candidate
from blockspin.surgery.memory import remove_blocks
from blockspin.tables import ranges

SAMPLES: dict[str, Any] = {
    "energy": "secant",
    "energy_samples": 12,
    "selection_samples": 4,
    "evaluation_samples": 6,
}
SMALL = {**SAMPLES, "max_length": 16, "states": 6, "budget": 1.0}
GOALS = {"1": 1, "2": 2}


@pytest.fixture(autouse=True)
def short_evolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "evopress", partial(baselines.evopress, offspring=3))


@pytest.fixture
def config(tiny_folder: Path, text_file: Path) -> CompressConfig:
    return CompressConfig(str(tiny_folder), str(text_file), remove=1, repair=False, **SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison; tests only read it."""
    folder = tmp_path_factory.mktemp("comparison")
    rows = [{"text": f"row {i} has some words {i * i} and a few more"} for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_tiny(folder / "model")
    config = CompressConfig(str(folder / "model"), str(folder / "text.jsonl"), remove=1, **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "evopress", partial(baselines.evopress, offspring=3))
        compare(config, GOALS, folder / "out")
    write_report(folder / "out")
    return folder


def test_every_method_is_measured_on_text_that_none_has_seen(finished: Path) -> None:
    comparison = Comparison.load(finished / "out" / "comparison.json")
    names = {row.method for row in comparison.rows}
    assert {
        "original",
        "CBO, selected",
        "CBO:0, secant",
        "CBO:0",
        "CBO, best of 20",
        "SLEB",
        "EvoPress",
        "sliding-window merging",
        "random",
    } <= names
    assert len(names) == 21 - 2  # "+" protects all four blocks of this model
    assert {reason.split(",")[0] for reason in comparison.left_out} == {
        "Shortened LLaMA PPL+",
        "Shortened LLaMA Taylor+",
    }
    model = tf.AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = tf.AutoTokenizer.from_pretrained(finished / "model")
    drawn = load_calibration(finished / "text.jsonl", tokenizer, num_samples=22, max_length=16, progress=False)
    for row in comparison.rows:
        assert len(row.removed) == (0 if row.method == "original" else int(row.goal))
        built = baselines.merge_windows(model, row.windows) if row.windows else remove_blocks(model, row.removed)
        assert row.loss == pytest.approx(mean_loss(built, drawn[16:]), rel=1e-5)
        assert row.num_parameters == sum(p.numel() for p in built.parameters())
        assert (row.kl < 1e-6) == (row.method == "original")
    for point in comparison.landscape["2"]:
        loss = mean_loss(remove_blocks(model, point.removed), drawn[12:16])
        assert point.loss == pytest.approx(loss, rel=1e-5)
        assert (point.drawn == ("original",)) == (point.removed == ())


def test_every_choice_is_measured_after_a_repair(finished: Path) -> None:
    comparison = Comparison.load(finished / "out" / "comparison.json")
    model = tf.AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = tf.AutoTokenizer.from_pretrained(finished / "model")
    drawn = load_calibration(finished / "text.jsonl", tokenizer, num_samples=22, max_length=16, progress=False)

    mended: dict[str, Any] = {"blockspin": repair, "LinearPatch": baselines.linear_patch}
    for row in comparison.repaired:
        if row.repair in mended:
            shortened = remove_blocks(model, row.removed)
            mended[row.repair](shortened, model, drawn[:16])
            assert row.loss == pytest.approx(mean_loss(shortened, drawn[16:]), rel=1e-3)

    chosen = [(row.goal, row.removed) for row in comparison.rows if row.removed and not row.windows]
    ours = {(row.goal, row.removed) for row in comparison.repaired if row.repair == "blockspin"}
    draws = [(row.goal, row.removed) for row in comparison.rows if row.method == "random"]
    assert ours <= set(chosen)
    assert set(chosen) - ours <= set(draws)
    for goal in GOALS:
        names = {row.repair for row in comparison.repaired if row.goal == goal}
        assert names == {"blockspin", "ReplaceMe", "ReplaceMe, cosine", "LinearPatch", "Ghosted Layers"}
    text = (finished / "out" / "repairs.md").read_text()
    assert text.count("CBO, selected for repair") == 5 * len(GOALS)
    assert "after a repair" in (finished / "out" / "report.html").read_text()


def test_costs_are_counted_in_forward_passes() -> None:
    model, samples = tiny_model("llama"), random_samples((8, 8, 8))
    batch, traced = make_batches(samples, 3)[0], trace_model(model)
    with torch.no_grad():
        with counted(model, 24) as whole:
            batch.forward(model)
        with skipped(traced, (0, 2)), counted(model, 24) as half:
            batch.forward(model)
    assert whole.passes == pytest.approx(1)
    assert half.passes == pytest.approx(0.5)
    with counted(model, 24) as trace:
        trace_model(model)
    with counted(model, 24) as splitting:
        split_model(model)
    with counted(model, 24) as gates:
        estimate_gradients(model, samples, progress=False)
    with counted(model, 24) as weights:
        baselines.weight_importance(model, samples)
    assert gates.passes - trace.passes == pytest.approx(2)  # forward and backward
    assert weights.passes - splitting.passes == pytest.approx(3, abs=0.1)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_an_interrupted_comparison_runs_no_finished_method_again(
    config: CompressConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = compare(config, GOALS, tmp_path / "unbroken")
    sleb, iterative = baselines.sleb, baselines.iterative_block_influence
    runs: list[int] = []

    def stopping(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    def counting(*args: Any, **kwargs: Any) -> Candidate:
        runs.append(1)
        return iterative(*args, **kwargs)

    monkeypatch.setattr(baselines, "sleb", stopping)
    monkeypatch.setattr(baselines, "iterative_block_influence", counting)
    with pytest.raises(KeyboardInterrupt):
        compare(config, GOALS, tmp_path / "out")
    assert len(runs) == 1
    monkeypatch.setattr(baselines, "sleb", sleb)
    resumed = compare(config, GOALS, tmp_path / "out")
    assert len(runs) == 2  # the other goal's
    assert [(r.method, r.goal, r.removed, r.loss) for r in resumed.rows] == [
        (r.method, r.goal, r.removed, r.loss) for r in unbroken.rows
    ]
    monkeypatch.setattr("blockspin.comparison.run.load_as", lambda *a, **k: pytest.fail("loaded the model again"))
    assert compare(config, GOALS, tmp_path / "out").rows == resumed.rows


def test_costs_outlive_kills(config: CompressConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the middle of an estimate, whose two parts add up, and one after the statistics were read."""
    few = [method for method in methods(config) if method.name in ("CBO:0", "block influence", "SLEB")]
    monkeypatch.setattr("blockspin.comparison.run.methods", lambda config: few)
    monkeypatch.setattr("blockspin.comparison.run.LANDSCAPE_DRAWS", 2)
    unbroken = compare(config, {"1": 1}, tmp_path / "unbroken").costs

    monkeypatch.setattr("blockspin.comparison.cost.KEEP_SECONDS", 0.0)
    append = Journal.append

    def killed(journal: Journal, entry: Mapping[str, Any]) -> None:
        append(journal, entry)
        raise KeyboardInterrupt

    def killed_at_once(case: Case) -> Candidate:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(config, {"1": 1}, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("blockspin.comparison.run.methods", lambda _: [*few[:-1], Method("SLEB", killed_at_once)])
        with pytest.raises(KeyboardInterrupt):
            compare(config, {"1": 1}, tmp_path / "out")

    costs = compare(config, {"1": 1}, tmp_path / "out").costs
    assert set(costs) == set(unbroken)
    for name, cost in unbroken.items():
        assert cost.passes * 0.999 <= costs[name].passes <= cost.passes * 1.5 + 1, name


def test_the_tables_hold_every_row(finished: Path) -> None:
    rows = Comparison.load(finished / "out" / "comparison.json").rows
    with (finished / "out" / "comparison.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(w["method"], w["goal"], float(w["loss"])) for w in written] == [(r.method, r.goal, r.loss) for r in rows]
    lines = (finished / "out" / "comparison.md").read_text().splitlines()
    assert len(lines) == 2 + len(averaged(rows))
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    random = [row for row in rows if (row.method, row.goal) == ("random", "2")]
    mean = next(row for row in averaged(rows) if (row.method, row.goal) == ("random", "2"))
    assert len(random) == 5
    assert mean.loss == pytest.approx(np.mean([row.loss for row in random]))
    for goal in GOALS:
        losses = [row.loss for row in averaged(rows) if row.goal == goal]
        assert losses[1:] == sorted(losses[1:])
        assert next(row for row in averaged(rows) if row.goal == goal).method == "original"
    assert len({len(line) for line in text_rows(rows)}) == 1


def test_the_page_needs_no_other_file(finished: Path) -> None:
    page = (finished / "out" / "report.html").read_text()
    assert "://" not in page
    assert str(finished) not in page
    for source in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert source.startswith(("#", "data:image/png;base64,"))

    # Identifiers of figures do not meet, and what they refer to is there.
    identifiers = re.findall(r' id="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(identifiers)
    assert page.count("<figure>") == 5

    comparison = Comparison.load(finished / "out" / "comparison.json")
    rows = averaged(comparison.rows)
    repaired = sum(1 + len(table.rows) for table in repairs_tables(comparison))
    assert len(re.findall("<tr[ >]", page)) == len(GOALS) + len(rows) + repaired
    assert len(re.findall("<tr class=ours>", page)) == len(GOALS)
    for table in repairs_tables(comparison):
        assert [method for method, *_ in table.rows].count("random") == 1


def test_the_page_says_what_is_in_the_rows(finished: Path) -> None:
    """The headline, the order of the tables and the block maps, against the rows themselves."""
    page = (finished / "out" / "report.html").read_text()
    comparison = Comparison.load(finished / "out" / "comparison.json")
    of_two = [row for row in comparison.rows if row.goal == "2"]
    original = next(row for row in of_two if row.method == "original")
    ours = next(row for row in of_two if row.method == "CBO, selected")
    rise = 100 * (math.exp(ours.loss - original.loss) - 1)
    assert f"perplexity rises by {rise:.1f}%" in page
    assert f"keeps {ours.num_parameters / original.num_parameters:.0%} of its parameters" in page

    for table in page.split("<table>")[1:]:
        first_numbers = re.findall(r'<tr[^>]*><td class="word">.*?</td><td>([\d.]+)', table)
        column = [float(value) for value in first_numbers]
        assert len(column) > 10
        assert column[1:] == sorted(column[1:])

    strips = re.findall(r'aria-label="removed: ([^"]*)"', page)
    expected = [ranges(row.removed) for row in averaged(comparison.rows) if row.removed]
    assert len(strips) == len(expected)
    for name, setting in (("calibration text", "12 samples"), ("evaluation text", "6 samples")):
        assert f"<dt>{name}</dt><dd>{setting}" in page


def test_rank_correlation() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.permutation(30), generator.permutation(30)
    assert spearman(a, b) == pytest.approx(1 - 6 * ((a - b) ** 2).sum() / (30 * (30**2 - 1)))
    assert spearman(a, np.exp(a / 5)) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 2.5, 2.5, 9]) == pytest.approx(1)
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_the_commands(finished: Path, command: Command) -> None:
    """Here nothing is left to compute: the goals of the folder are shown, and the page is made again."""
    sizes = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", value)]
    common = [finished / "model", "--calibration", finished / "text.jsonl", "--out", finished / "out", *sizes]
    code, printed = command("compare", *common, "--remove", "1,2")
    assert code == 0
    assert "sliding-window merging" in printed
    (finished / "out" / "report.html").unlink()
    assert command("report", finished / "out")[0] == 0
    assert (finished / "out" / "report.html").exists()
    for changes, message in (
        (["--remove", "1", "--seed", 7], "other settings (seed)"),
        (["--remove", "9"], "remove"),
        (["--remove", "many"], "--remove"),
        (["--remove", "mamba=1"], "mamba"),
        (["--remove", "1", "--out", finished], "is not a comparison"),
    ):
        code, printed = command("compare", *common, *changes)
        errors = [line for line in printed.splitlines() if line.startswith("Error:")]
        assert (code, len(errors)) == (2, 1), printed
        assert message in errors[0]
    code, printed = command("report", finished)
    assert code == 2
    assert "no folder of `blockspin compress` or `blockspin compare`" in printed


def test_draws_of_one_method_become_their_mean() -> None:
    def row(method: str, loss: float) -> Row:
        return Row(method, "2", (1,), 0.5, (), 1.0, 2.0, loss, 0.1, 0.9, 10, 20, 30.0)

    means = averaged([row("original", 9.0), row("a", 3.0), row("b", 2.0), row("a", 1.5)])
    assert [(mean.method, mean.loss) for mean in means] == [("original", 9.0), ("b", 2.0), ("a", 2.25)]
    assert (means[1].removed, means[2].removed) == ((1,), ())


def test_terminal_tables_begin_with_the_best_by_what_was_minimised() -> None:
    rows = []
    for method, loss, kl in (("original", 2.0, 0.0), ("a", 3.0, 0.2), ("b", 2.5, 0.4)):
        rows.append(Row(method, "2", (1,), 0.5, (), 1.0, 2.0, loss, kl, 0.9, 10, 20, 30.0))
    for objective, order in (("loss", ["original", "b", "a"]), ("kl", ["original", "a", "b"])):
        (table,) = terminal_tables(rows, objective)
        assert [row[0] for row in table.rows] == order
