"""Comparisons of methods that remove sub-layers, and under targets: every choice meets them, and the page says so."""

from __future__ import annotations

import csv
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import Command, save_tiny

from blockspin import baselines
from blockspin.comparison.methods import methods
from blockspin.comparison.report import origin_section, write_report
from blockspin.comparison.results import Asked, Comparison, averaged, file_part, goal_title
from blockspin.comparison.run import compare, goals_named
from blockspin.config import CompressConfig
from blockspin.data.calibration import load_calibration
from blockspin.model.losses import mean_loss
from blockspin.repairs.run import repair
from blockspin.surgery.memory import remove_blocks

SMALL: dict[str, Any] = {
    "energy": "secant",
    "energy_samples": 12,
    "selection_samples": 4,
    "evaluation_samples": 6,
    "max_length": 16,
    "states": 6,
    "budget": 1.0,
}
GOAL = "--target-params 70%"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of sub-layers under a target; tests only read it."""
    folder = tmp_path_factory.mktemp("sublayers")
    (folder / "text.txt").write_text("".join(f"row {i} has some words {i * i} and a few more\n\n" for i in range(40)))
    save_tiny(folder / "model")
    config = CompressConfig(
        str(folder / "model"), str(folder / "text.txt"), units="sublayers", target_params=0.7, **SMALL
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "evopress", partial(baselines.evopress, offspring=3))
        compare(config, goals_named(config, {}), folder / "out")
    write_report(folder / "out")
    return folder


def drawn(folder: Path) -> list[torch.Tensor]:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "model")
    return load_calibration(folder / "text.txt", tokenizer, num_samples=22, max_length=16, progress=False)


def test_every_method_that_can_removes_sublayers_within_the_budget(finished: Path) -> None:
    comparison = Comparison.load(finished / "out" / "comparison.json")
    names = {row.method for row in comparison.rows}
    assert {
        "CBO, selected",
        "CBO, selected for repair",
        "CBO:0",
        "BlockPruner",
        "FinerCut",
        "LLM-Drop",
        "EvoPress",
        "random",
    } <= names
    for method in ("sliding-window merging", "Shortened LLaMA Taylor", "Shortened LLaMA PPL+"):
        assert "whole blocks, and here sub-layers go" in comparison.left_out[f"{method}, {GOAL}"]

    model, text = tf.AutoModelForCausalLM.from_pretrained(finished / "model"), drawn(finished)[16:]
    whole = model.num_parameters()
    for row in comparison.rows:
        assert row.goal == GOAL
        built = remove_blocks(model, row.removed, units="sublayers") if row.removed else model
        assert row.loss == pytest.approx(mean_loss(built, text), rel=1e-5)
        assert row.num_parameters == built.num_parameters()
        assert (built.num_parameters() <= 0.7 * whole) == (row.method != "original")
        assert row.num_bytes == pytest.approx(4 * built.num_parameters(), rel=0.01)


def test_choices_of_sublayers_are_repaired(finished: Path) -> None:
    comparison = Comparison.load(finished / "out" / "comparison.json")
    assert {row.repair for row in comparison.repaired} == {"blockspin"}
    assert "whole blocks are gone" in next(why for name, why in comparison.left_out.items() if "ReplaceMe" in name)
    chosen = {row.removed for row in comparison.rows if row.method not in ("original", "random")}
    assert chosen <= {row.removed for row in comparison.repaired}

    model, text = tf.AutoModelForCausalLM.from_pretrained(finished / "model"), drawn(finished)
    row = comparison.repaired[0]
    shortened = remove_blocks(model, row.removed, units="sublayers")
    repair(shortened, model, text[:16])
    assert row.loss == pytest.approx(mean_loss(shortened, text[16:]), rel=1e-3)


def test_the_tables_and_the_page_speak_of_the_target(finished: Path) -> None:
    out = finished / "out"
    rows = Comparison.load(out / "comparison.json").rows
    with (out / "comparison.csv").open() as file:
        assert [line["goal"] for line in csv.DictReader(file)] == [row.goal for row in rows]
    heading = (out / "comparison.md").read_text().splitlines()[0]
    assert heading.rstrip("| ").endswith("sub-layers")

    page = (out / "report.html").read_text()
    ours = next(row for row in rows if row.method == "CBO, selected")
    assert f"Without {len(ours.removed)} of its 8 sub-layers" in page
    assert f"ways to meet {GOAL}, blockspin&#x27;s choice" in page
    assert f"blockspin compare model {GOAL} " in page
    assert "--units sublayers" in page
    assert "Which sub-layers each method removes" in page
    assert page.count("<figure>") == 5
    strips = re.findall(r'viewBox="0 0 8 1"', page)
    assert len(strips) == sum(1 for row in averaged(rows) if row.removed)


def test_targets_hold_for_every_goal_and_others_may_be_added(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"CBO:0", "SLEB", "angular distance", "random"}
    monkeypatch.setattr(
        "blockspin.comparison.run.methods", lambda config: [one for one in methods(config) if one.name in few]
    )
    config = CompressConfig(str(tiny_folder), str(text_file), target_params=0.9, repair=False, **SMALL)
    first = compare(config, goals_named(config, {"2": 2}), tmp_path / "out")
    assert {row.goal for row in first.rows} == {"2, --target-params 90%"}
    assert {len(row.removed) for row in first.rows if row.removed} == {2}

    other = replace(config, target_params=0.7)
    both = compare(other, goals_named(other, {}), tmp_path / "out")
    assert list(both.landscape) == ["2, --target-params 90%", "--target-params 70%"]
    whole = both.rows[0].num_parameters
    tight = [row for row in both.rows if row.goal == "--target-params 70%" and row.removed]
    assert {row.method for row in tight} == few
    assert all(row.num_parameters <= 0.7 * whole for row in tight)

    page = write_report(tmp_path / "out").read_text()
    name = tiny_folder.name
    assert f"blockspin compare {name} --remove 2 --target-params 90% " in page
    assert f"blockspin compare {name} --target-params 70% " in page


def test_what_cannot_be_compared_is_one_line(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    run = ("compare", tiny_folder, "--calibration", text_file, "--out", tmp_path / "out", "--max-length", 16)
    for options, message in (
        ((), "say what to remove"),
        (("--target-params", "1%"), "out of reach"),
        (("--units", "sublayers", "--target-params", "1%"), "out of reach"),
        (("--units", "sublayers", "--remove", 2, "--against", "qwen3-14b"), "are of whole blocks"),
        (("--target-speedup", 1.4, "--profile", tmp_path / "none.json"), "cannot be read"),
    ):
        code, printed = command(*run, *options)
        errors = [line for line in printed.splitlines() if line.startswith("Error:")]
        assert (code, len(errors)) == (2, 1), printed
        assert message in errors[0]


def test_goals_in_words_and_in_names_of_files() -> None:
    for goal, title, part in (
        ("8", "remove 8", "8"),
        ("moe=2,mlp=1", "remove moe=2,mlp=1", "moe=2,mlp=1"),
        ("--target-size 5GB", "meet --target-size 5GB", "target-size-5GB"),
        (
            "4, --target-size 5GB, --target-speedup 1.4",
            "remove 4, --target-size 5GB, --target-speedup 1.4",
            "4+target-size-5GB+target-speedup-1.4",
        ),
    ):
        assert (goal_title(goal), file_part(goal)) == (title, part)


def test_the_page_has_the_commands_of_all_goals(tmp_path: Path) -> None:
    """One for each set of targets; numbers by kind are an option each. Of a file that does not tell there is none."""
    targets = {"target_size": 5e9, "target_speedup": 1.4}
    asked = {
        "4": Asked(4, {}),
        "moe=2,mlp=1": Asked({"moe": 2, "mlp": 1}, {}),
        "25%": Asked(0.25, {}),
        "4, --target-size 5GB, --target-speedup 1.4": Asked(4, targets),
        "--target-size 5GB, --target-speedup 1.4": Asked(None, targets),
        "--target-size 5GB": Asked(None, {"target_size": 5e9}),
    }
    Comparison(asdict(CompressConfig("org/model", "org/text", 4)), goals=asked).save(tmp_path / "comparison.json")
    loaded = Comparison.load(tmp_path / "comparison.json")
    assert loaded.goals == asked
    section = origin_section(loaded, [*asked, "a goal of an older file"])
    for words in (
        "--remove 4,25% --remove moe=2,mlp=1",
        "--remove 4 --target-size 5GB --target-speedup 1.4",
        "--target-size 5GB",
    ):
        assert f"blockspin compare org/model {words} --calibration org/text --out DIR" in section
    assert section.count("blockspin compare") == 3
