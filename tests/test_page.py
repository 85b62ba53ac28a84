"""Pages as a browser shows them: nothing is wider than the window; the parts of a page say what they are given."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, settings
from matplotlib.figure import Figure
from matplotlib.image import imread

from blockspin import page
from blockspin.pipeline.compress import compress
from blockspin.pipeline.origin import command_options, goal_text, public_settings
from blockspin.sources import public_name
from blockspin.tables import Column, Table
from blockspin.training import DistillConfig

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAPER = {"light": (255, 255, 255), "dark": (0x13, 0x16, 0x1A)}
LONG = "a-long-name-of-a-model-that-goes-on-and-on" * 2


def example() -> str:
    """A page with everything that could be too wide."""
    drawing = Figure(figsize=(14, 3))
    drawing.add_subplot().plot([1, 2, 3], color="#0072B2", label="line")
    table = Table([Column("name", words=True), *(Column(f"number {i}") for i in range(20))], [[LONG, *"0" * 20]] * 3)
    parts = [
        page.header(LONG, f"Without 8 blocks {LONG} is smaller"),
        page.tiles([("+10.5% ±0.4", LONG)] * 4),
        page.figure(drawing, "first", LONG),
        page.section("Table", [page.html_table(table, [1])], LONG, shown=True),
        page.section("Map", [page.block_map([("remove 8", "", False), (LONG, page.block_strip((1, 5), 80), True)])]),
        page.section("Facts", [page.facts({"processor": LONG}), page.code(f"blockspin {LONG} " * 5)], shown=True),
    ]
    return page.page("a page", parts)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(tmp_path: Path, width: int, scheme: str) -> None:
    """The page tells its own width in its colour: it is red where something sticks out."""
    check = "if(document.documentElement.scrollWidth>innerWidth)document.body.style.background='red'"
    (tmp_path / "page.html").write_text(example().replace("</body>", f"<script>{check}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--disable-background-networking", "--disable-component-update", f"--window-size={width},2000"]
    options += [
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    assert BROWSER is not None
    command = [BROWSER, *options, f"--screenshot={tmp_path / 'shot.png'}", f"file://{tmp_path / 'page.html'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)

    shot = np.rint(255 * imread(tmp_path / "shot.png")[..., :3]).astype(int)  # (height, width, 3)
    assert shot.shape[1] == width
    assert tuple(shot[-1, 1]) == PAPER[scheme]
    assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 50  # something is drawn


def test_figures_take_the_colours_of_the_page() -> None:
    drawings = []
    for _ in range(2):
        drawing = Figure()
        drawing.add_subplot().plot([1, 2], color="#0072B2")
        drawings.append(drawing)
    first, second = (page.vector(drawing, name) for drawing, name in zip(drawings, ("first", "second"), strict=True))
    assert "var(--accent)" in first
    assert "#0072b2" not in first.lower()
    assert "xmlns" not in first
    names = [set(re.findall(r' id="([^"]*)"', text)) for text in (first, second)]
    assert names[0]
    assert not names[0] & names[1]


def test_text_is_not_code() -> None:
    shown = page.header("<b>", "<script>", "&") + page.facts({"<i>": "<u>"}) + page.code("<pre>")
    assert not re.search(r"<(b|script|i|u)>", shown)


def test_block_strips_fill_what_is_removed() -> None:
    strip = page.block_strip((1, 2, 7), 9, merged=(0,))
    colours = re.findall(r'fill="var\(--(\w+)\)"', strip)
    expected = ["merged", "accent", "accent", *["line"] * 4, "accent", "line"]
    assert colours == expected
    assert 'aria-label="removed: 1-2,7"' in strip


def test_runs_are_told_without_folders(
    tiny_folder: Path, text_file: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tiny_folder.rename(tmp_path / "a model"), text_file)
    rows = compress(config, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert str(tmp_path) not in text
    assert f"{rows[2].perplexity:.4g}" in text
    for said in (
        "24 samples",
        "blockspin compress &#x27;a model&#x27; --remove 2",
        "states: 6",
        "<dt>date</dt>",
        "transformers ",
    ):
        assert said in text

    (tmp_path / "run" / "report.html").unlink()
    capsys.readouterr()
    code, printed = command("report", tmp_path / "run", "--json", "--quiet")
    assert (code, json.loads(printed)) == (0, json.loads((tmp_path / "run" / "evaluation.json").read_text()))
    assert (tmp_path / "run" / "report.html").read_text() == text


def test_origins(tmp_path: Path) -> None:
    assert public_name(str(tmp_path / "a" / "model")) == "model"
    assert public_name("someone/model") == "someone/model"
    assert public_name(f"someone/texts, {tmp_path}/own.jsonl") == "someone/texts,own.jsonl"
    assert [goal_text(goal) for goal in (8, 0.25, {"moe": 2, "mlp": 1}, None)] == [
        "--remove 8",
        "--remove 25%",
        "--remove moe=2,mlp=1",
        "",
    ]
    given = {"model": "/a/b", "remove": 8, "calibration": "/c/d e.txt", "states": 6, "protect": (1, 2), "seed": 42}
    assert public_settings(given)["protect"] == [1, 2]
    options = command_options(public_settings(given))
    assert options == "--calibration 'd e.txt' --states 6 --protect 1,2"
    trained = public_settings({"distill": {"data": str(tmp_path / "a" / "chat.jsonl"), "max_steps": 7, "seed": None}})
    assert trained == {"distill": {"data": "chat.jsonl", "max_steps": 7}}
    training = command_options(trained["distill"], DistillConfig, "distill_")
    assert training == "--distill-data chat.jsonl --distill-max-steps 7"
    off = {
        "repair": False,
        "choose_repaired": True,
        "stream": False,
        "own_text": 0.0,
        "target_size": 5e9,
        "budget": 8.0,
    }
    assert command_options(off) == "--no-repair --own-text 0.0 --target-size 5000000000 --budget 8.0"
