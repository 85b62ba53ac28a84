"""The wheel in an environment of its own, outside the repository: the demo works, and its checkpoint generates text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
import transformers as tf

from blockspin.demo import MODEL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, install it alone in a new environment that borrows only our dependencies, run the demo there."""
    folder = tmp_path_factory.mktemp("demo")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 10 * 2**20
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = next((folder / "env").glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    # After the wheel, so that it wins over the editable install; .pth files in there are not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import blockspin; print(blockspin.__file__)"],
        cwd=folder / "empty",
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(site)
    done = subprocess.run(
        [python, "-m", "blockspin", "demo"],
        cwd=folder / "empty",
        env={**environment, "COLUMNS": "80"},
        check=True,
        capture_output=True,
        text=True,
    )
    (folder / "printed.txt").write_text(done.stdout)
    return folder


@pytest.mark.timeout(600)
def test_the_demo_prints_its_table(demo_run: Path) -> None:
    printed = (demo_run / "printed.txt").read_text()
    rows = json.loads((demo_run / "empty" / "blockspin-demo" / "evaluation.json").read_text())
    assert [row["name"].split(" ")[0] for row in rows] == ["original", "CBO:0", "chosen", "random", "repaired"]
    for row in rows:
        assert row["name"] in printed
        assert f"{row['perplexity']:.2f}" in printed
    original, ground, chosen, random, repaired = rows
    assert [len(row["removed"]) for row in rows] == [0, 8, 8, 8, 8]
    perplexities = [row["perplexity"] for row in (original, repaired, chosen, random)]
    assert perplexities == sorted(perplexities)
    assert chosen["num_parameters"] < original["num_parameters"]
    assert ground["num_bytes"] == chosen["num_bytes"] < original["num_bytes"]


def test_the_demo_leaves_a_whole_run(demo_run: Path) -> None:
    names = {path.name for path in (demo_run / "empty" / "blockspin-demo").iterdir()}
    assert names >= {"run.yaml", "energies.safetensors", "spectrum.json", "candidates.json", "checkpoint"}
    assert not any("partial" in name for name in names)


def test_the_checkpoint_generates_text_with_its_cache(demo_run: Path) -> None:
    folder = demo_run / "empty" / "blockspin-demo" / "checkpoint"
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("It was a dark and stormy", return_tensors="pt")
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (model.generate(**prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert len(set(cached[0].tolist())) > 5


def test_the_embedded_model_is_trained_and_small() -> None:
    """Its card's measurements are there, and the weights predict text far better than chance."""
    from blockspin import load_calibration, perplexity
    from blockspin.demo import CALIBRATION, VALIDATION

    folder = Path(MODEL).parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10 * 2**20
    card = (Path(MODEL) / "README.md").read_text()
    assert card.count("\n| ") >= 3 + 24
    model = tf.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = tf.AutoTokenizer.from_pretrained(MODEL)
    for text in (CALIBRATION, VALIDATION):
        samples = load_calibration(text, tokenizer, num_samples=8, max_length=256, progress=False)
        assert perplexity(model, samples) < len(tokenizer) / 20
