"""Model cards, read back as the hub reads them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import Command, settings
from huggingface_hub import ModelCard

from blockspin import prune_checkpoint
from blockspin.pipeline.compress import compress
from blockspin.surgery.card import write_card

CLAIMS = "---\nlicense: apache-2.0\nlanguage: [en, de]\ndatasets: [some/data]\n---\n# Tiny\nIt scores 99.9 on all.\n"


def test_the_licence_is_kept_and_the_claims_are_not(tiny_folder: Path, tmp_path: Path) -> None:
    (tiny_folder / "README.md").write_text(CLAIMS)
    (tiny_folder / "LICENSE").write_text("the licence")
    prune_checkpoint(tiny_folder, [1], tmp_path / "three", progress=False)
    prune_checkpoint(tmp_path / "three", [1], tmp_path / "two", progress=False)
    assert (tmp_path / "two" / "LICENSE").read_text() == "the licence"

    card = ModelCard.load(tmp_path / "two" / "README.md")
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en", "de"], None)
    assert card.data.base_model is None
    assert "without 2 of its 4 blocks" in card.text
    assert "blockspin prune three --blocks 1 --out" in card.text
    for absent in ("99.9", str(tmp_path)):
        assert absent not in card.content


@pytest.mark.parametrize("head", ["", "---\nlicense: [unclosed\n---\n", "---\n- a list\n---\n"])
def test_cards_without_a_head_say_nothing(tiny_folder: Path, tmp_path: Path, head: str) -> None:
    (tiny_folder / "README.md").write_text(head + "text")
    prune_checkpoint(tiny_folder, [0], tmp_path / "three", progress=False)
    assert ModelCard.load(tmp_path / "three" / "README.md").data.license is None


def test_the_base_model_is_one_of_the_hub(tmp_path: Path) -> None:
    kept = {"removed": [2, 3, 4, 7], "kept": [0, 1, 5, 6]}
    record = {"source": "someone/model", **kept, "blockspin": "1", "transformers": "5"}
    write_card(tmp_path, record, 1000, tmp_path / "absent.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "someone/model"
    assert "someone/model without 4 of its 8 blocks" in card.text
    assert "2-4,7" in card.text


def test_a_run_adds_what_it_measured(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    rows = compress(settings(tiny_folder, text_file), tmp_path / "run")
    text = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert [row.name for row in rows][-1] == "repaired"
    for row in rows[:-1]:
        assert f"{row.perplexity:.2f}" in text
    assert "## Repair" in (tmp_path / "run" / "repaired" / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "run" / "repaired" / "README.md").read_text()
    assert text.index("## Quality") < text.index("## What to expect")
    assert "KL divergence" in text
    assert str(tmp_path) not in text


def test_the_command_of_a_repair_makes_the_same_weights(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a run on two texts, from the folder in which its names are found."""
    more = tmp_path / "more.jsonl"
    more.write_text("".join(f'{{"text": "word {i} and another, {i * i} in all"}}\n' for i in range(60)))
    compress(settings(tiny_folder, f"{text_file},{more}", seed=0, own_text=0.25), tmp_path / "run")
    card = (tmp_path / "run" / "repaired" / "README.md").read_text()
    found = re.search(r"^blockspin repair .*$", card, re.MULTILINE)
    assert found is not None
    for folder in (tiny_folder, tmp_path / "run" / "checkpoint"):
        shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    for text in (text_file, more):
        shutil.copy(text, tmp_path / "elsewhere")
    assert f"--data {text_file.name},{more.name}" in found[0]

    monkeypatch.chdir(tmp_path / "elsewhere")
    code, said = command(*shlex.split(found[0])[1:])
    assert code == 0, said
    again, first = Path("repaired"), tmp_path / "run" / "repaired"
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert found[0] in (again / "README.md").read_text()


def test_the_command_of_a_training_makes_the_same_weights(
    command: Command, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With settings that are not the defaults, among them one that is zero, and names that a shell would take apart."""
    original = tiny_folder.rename(tmp_path / "the original")
    prune_checkpoint(original, [1, 2], tmp_path / "student", progress=False)
    monkeypatch.chdir(tmp_path)
    options = "--max-length 16 --batch-size 2 --max-steps 2 --warmup-steps 0 --learning-rate 0.003 --train neighbours"
    given = ["--teacher", original, "--data", text_file, "--out", "first", *options.split()]
    code, said = command("distill", tmp_path / "student", *given)
    assert code == 0, said

    card = Path("first/README.md").read_text()
    pruned, trained = (re.search(rf"^blockspin {name} .*$", card, re.MULTILINE) for name in ("prune", "distill"))
    assert pruned is not None
    assert shlex.split(pruned[0])[2] == original.name
    assert trained is not None
    code, said = command(*shlex.split(trained[0])[1:])
    assert code == 0, said
    again, first = Path("trained"), Path("first")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
