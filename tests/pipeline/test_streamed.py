"""A run with the blocks on disk makes the files of a run in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import settings

from blockspin.model.loading import load_model
from blockspin.model.offload import is_offloaded
from blockspin.pipeline.compress import compress


def run(model: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """What a run leaves behind, without what differs between any two runs."""
    compress(settings(model, text, choose_repaired=False, own_text=0, **changes), out)
    selection = json.loads((out / "candidates.json").read_text())
    rows = json.loads((out / "evaluation.json").read_text())
    selection.pop("seconds")
    for row in rows:
        row.pop("tokens_per_second")
    weights = {}
    for folder in ("checkpoint", "repaired"):
        for path in (out / folder).glob("*.safetensors"):
            weights[f"{folder}/{path.name}"] = path.read_bytes()
    return {"energies": (out / "energies.safetensors").read_bytes(), "selection": selection, "rows": rows} | weights


@pytest.mark.parametrize("energy", ["secant", "fitted"])
def test_files_are_those_of_a_run_in_memory(energy: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    in_memory = run(tiny_folder, text_file, tmp_path / "plain", energy=energy)
    streamed = run(tiny_folder, text_file, tmp_path / "streamed", energy=energy, stream=True)
    assert streamed == in_memory
    assert "repaired/model.safetensors" in streamed


def test_model_that_does_not_fit_is_streamed_and_that_is_said(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_offloaded(load_model(tiny_folder))
    monkeypatch.setattr("blockspin.model.placement.available_memory", lambda: 10_000)
    assert is_offloaded(load_model(tiny_folder))
    assert "its blocks stay on disk" in " ".join(capsys.readouterr().err.split())

    # Whoever names a place gets it.
    assert not is_offloaded(load_model(tiny_folder, device_map="cpu"))


def test_that_the_last_candidates_are_not_repaired_is_said(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(settings(tiny_folder, text_file, stream=True, energy="secant", own_text=0), tmp_path / "out")
    assert "without a repair: its blocks are not in memory" in " ".join(capsys.readouterr().err.split())


def test_stream_and_a_device_map_exclude_each_other(tiny_folder: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match=r"--stream .*leave out --device-map"):
        settings(tiny_folder, text_file, stream=True, device_map="cpu")


@pytest.mark.parametrize("changes", [{"energy": "empirical-fisher"}, {"tasks": ("gsm8k",)}])
def test_gradients_and_tasks_are_refused_before_anything_is_read(
    changes: dict[str, Any], tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--stream.*(--energy fitted|leave out --tasks)"):
        compress(settings(tiny_folder, text_file, stream=True, **changes), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
