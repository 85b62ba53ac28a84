"""Files and names that are not right: one line that says what is wrong, exit code 2, nothing written or left behind."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, save_tiny

from blockspin import hub


@pytest.fixture
def refuses(command: Command, tmp_path: Path) -> Any:
    """Run a command that must be refused: returns its one line. What is in the test's folder must stay as it was."""

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def run(*arguments: object) -> str:
        before = contents()
        code, printed = command(*arguments)
        errors = [line for line in printed.splitlines() if line.startswith("Error:")]
        assert (code, len(errors)) == (2, 1), printed
        assert "Traceback" not in printed
        assert contents() == before
        return errors[0]

    return run


def change_config(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def energies_of(model: object, data: object, out: Path) -> tuple[object, ...]:
    sizes = ("--energy-samples", 4, "--max-length", 16, "--energy", "empirical-fisher")
    return ("energies", model, "--calibration", data, *sizes, "--out", out)


ODD_SETTINGS: dict[str, list[Any]] = {
    "num_hidden_layers": ["4", 4.5, -1, None, []],
    "hidden_size": ["x", [32], 0, 33],
    "vocab_size": [-3, "many"],
    "num_attention_heads": [0, "four"],
    "model_type": ["nonsense", 5, None],
    "hidden_act": ["nonsense", 5],
    "layer_types": ["abc", ["nonsense"] * 4],
    "rope_parameters": [5, {"rope_type": "nonsense"}],
    "quantization_config": [5],
    "auto_map": [5],
    "id2label": [5],
    "pad_token_id": ["a"],
    "tie_word_embeddings": ["maybe"],
    "max_position_embeddings": ["a"],
    "architectures": [5],
}


@pytest.mark.parametrize("name", ODD_SETTINGS)
def test_an_odd_configuration(refuses: Any, tiny_folder: Path, text_file: Path, tmp_path: Path, name: str) -> None:
    original = (tiny_folder / "config.json").read_text()
    for value in ODD_SETTINGS[name]:
        (tiny_folder / "config.json").write_text(original)
        change_config(tiny_folder, **{name: value})
        refuses("info", tiny_folder)
        refuses("prune", tiny_folder, "--blocks", 1, "--out", tmp_path / "short")
        refuses(*energies_of(tiny_folder, text_file, tmp_path / "e.safetensors"))


@pytest.mark.parametrize("content", ["", "[]", "5", "null", "{", '"text"', "\0"])
def test_a_configuration_that_is_none(refuses: Any, tiny_folder: Path, tmp_path: Path, content: str) -> None:
    (tiny_folder / "config.json").write_text(content)
    refuses("info", tiny_folder)
    refuses("prune", tiny_folder, "--blocks", 1, "--out", tmp_path / "short")


@pytest.mark.parametrize("content", ["", "[]", "5", "{}", '{"model": {}}', '{"version": "1.0", "model": 3}'])
def test_an_odd_tokenizer(refuses: Any, tiny_folder: Path, text_file: Path, tmp_path: Path, content: str) -> None:
    (tiny_folder / "tokenizer.json").write_text(content)
    line = refuses(*energies_of(tiny_folder, text_file, tmp_path / "e.safetensors"))
    assert "tokenizer" in line or "no sample" in line


def test_the_tokenizer_of_another_model(refuses: Any, text_file: Path, tmp_path: Path) -> None:
    model, other = save_tiny(tmp_path / "model", vocabulary=260), save_tiny(tmp_path / "other")
    shutil.copy(other / "tokenizer.json", model / "tokenizer.json")
    change_config(other, vocab_size=260)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "a few words to learn from"}) + "\n")
    line = refuses(*energies_of(model, tmp_path / "words.jsonl", tmp_path / "e.safetensors"))
    assert "the model knows only 260" in line
    shared = ("--remove", 1, "--calibration", tmp_path / "words.jsonl")
    assert "knows only 260" in refuses("compress", model, *shared, "--out", tmp_path / "run")
    assert "knows only 260" in refuses("compare", model, *shared, "--out", tmp_path / "comparison")
    assert "knows only 260" in refuses("evaluate", model, "--data", tmp_path / "words.jsonl")
    assert "knows only 260" in refuses("evaluate", model, "--text", tmp_path / "words.jsonl")


@pytest.mark.parametrize("name", ["absent", "some/where/absent", "no name at all", "../absent", "file"])
def test_a_model_that_is_not_there(
    refuses: Any, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(hub, "_reachable", lambda: pytest.fail("asked the hub"))
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / name if name in ("absent", "file") else name
    for line in (
        refuses("info", path),
        refuses("prune", path, "--blocks", 1, "--out", tmp_path / "short"),
        refuses(*energies_of(path, text_file, tmp_path / "e.safetensors")),
        refuses("evaluate", path, "--data", text_file),
        refuses("distill", path, "--teacher", path, "--data", text_file, "--out", tmp_path / "taught"),
    ):
        assert "there is no such folder, and it is no hub id" in line


def test_a_hub_that_cannot_be_reached_is_asked_once(
    command: Command,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its client would try six times, and wait 23 seconds in all."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for arguments in (("info", "org/absent"), energies_of(tiny_folder, "org/absent", tmp_path / "e.safetensors")):
        capsys.readouterr()
        code, printed = command(*arguments)
        assert (code, printed.count("\n")) == (2, 1), printed
        assert "org/absent" in printed
    assert sum(waited) < 1
