"""The teacher's view on disk, against the teacher itself."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_model
from students import losses_of, reference_kl, settings, shortened
from transformers import PreTrainedModel

from blockspin.data.packing import Windows
from blockspin.distillation import cache
from blockspin.distillation.cache import TeachersView, teachers_view
from blockspin.distillation.loss import DistillationLoss, split
from blockspin.distillation.run import Distillation, distill_checkpoint
from blockspin.files import write_json
from blockspin.surgery.checkpoint import prune_checkpoint

LENGTH = 12


@pytest.fixture
def windows(tmp_path: Path) -> Windows:
    rows = np.random.default_rng(0).integers(2, VOCABULARY, (7, LENGTH)).astype(np.int32)
    rows.tofile(tmp_path / "windows")
    return Windows(tmp_path / "windows", LENGTH)


def view_of(
    windows: Windows, folder: Path, teacher: PreTrainedModel, k: int = 5, temperature: float = 1.0
) -> TeachersView:
    return teachers_view(windows, folder, k, temperature, "the teacher", lambda: teacher)


def losses_with(view: TeachersView, student: PreTrainedModel, **options: Any) -> dict[str, torch.Tensor]:
    items = [view[i] for i in range(len(view))]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    with torch.no_grad():
        return DistillationLoss(split(student), None, **options)(**batch)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_losses_are_those_of_the_teacher_itself(windows: Windows, tmp_path: Path, temperature: float) -> None:
    """With some of the tokens as the loss on top-k, with all of them as the KL over the vocabulary."""
    student, teacher = shortened()
    token_ids = torch.from_numpy(np.array(windows.rows, dtype=np.int64))
    options: dict[str, Any] = {"temperature": temperature, "chunk_tokens": 5}
    few = losses_with(view_of(windows, tmp_path / "few", teacher, 5, temperature), student, **options)
    expected = losses_of(student, teacher, {"input_ids": token_ids}, top_k=5, **options)
    torch.testing.assert_close(few, {name: values.detach() for name, values in expected.items()})

    everything = losses_with(view_of(windows, tmp_path / "all", teacher, VOCABULARY, temperature), student, **options)
    with torch.no_grad():
        exact = reference_kl(student(token_ids).logits, teacher(token_ids).logits, temperature)
    torch.testing.assert_close(everything["kl"], exact, rtol=1e-3, atol=1e-5)


def test_a_view_that_was_cut_off_is_continued(
    windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_model("llama")
    whole = view_of(windows, tmp_path / "whole", teacher)
    monkeypatch.setattr(cache, "TOKENS_AT_ONCE", 2 * LENGTH)
    calls = []

    def cut(path: Path, value: Any) -> None:
        write_json(path, value)
        if value == 4:
            raise KeyboardInterrupt

    def counted(path: Path, value: Any) -> None:
        write_json(path, value)
        calls.append(value)

    monkeypatch.setattr(cache, "write_json", cut)
    with pytest.raises(KeyboardInterrupt):
        view_of(windows, tmp_path / "cut", teacher)
    monkeypatch.setattr(cache, "write_json", counted)
    continued = view_of(windows, tmp_path / "cut", teacher)
    assert calls == [6, 7]  # windows that are finished
    assert np.array_equal(continued.tokens, whole.tokens)
    np.testing.assert_allclose(continued.values, whole.values, rtol=1e-5)


def test_a_finished_view_needs_no_teacher_and_is_no_other_texts(windows: Windows, tmp_path: Path) -> None:
    view = view_of(windows, tmp_path / "view", tiny_model("llama"))

    def never() -> PreTrainedModel:
        raise AssertionError

    again = teachers_view(windows, tmp_path / "view", 5, 1.0, "the teacher", never)
    assert np.array_equal(again.values, view.values)
    with pytest.raises(ValueError, match=r"other settings \(temperature\); .*\(--cache-teacher\) or remove this one"):
        teachers_view(windows, tmp_path / "view", 5, 2.0, "the teacher", never)
    np.array(windows.rows[::-1]).tofile(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other settings \(text\)"):
        teachers_view(Windows(tmp_path / "other", LENGTH), tmp_path / "view", 5, 1.0, "the teacher", never)


def test_a_full_disk_is_noticed_before(windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 7 * LENGTH * 5 * 8 - 1))
    with pytest.raises(ValueError, match=r"no room for the teacher's cache: 3.36 kB .*84 tokens .*lower --top-k"):
        view_of(windows, tmp_path / "view", tiny_model("llama"))
    assert not (tmp_path / "view").exists()


def test_training_on_the_view_is_training_with_the_teacher(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_checkpoint(tiny_folder, [1, 2], tmp_path / "student", progress=False)

    def run(out: str, **changes: Any) -> Distillation:
        config = settings(teacher=str(tiny_folder), data=str(text_file), top_k=8, max_steps=4, log_steps=1, **changes)
        return distill_checkpoint(tmp_path / "student", tmp_path / out, config)

    direct = run("direct")
    cached = run("cached", cache_teacher=str(tmp_path / "view"))
    reports = [[row["loss"] for row in result.history if "loss" in row] for result in (direct, cached)]
    assert reports[1] == pytest.approx(reports[0], rel=1e-4)
    assert cached.after["kl"] == pytest.approx(direct.after["kl"], rel=1e-4)
    assert json.loads((tmp_path / "view" / "settings.json").read_text())["top_k"] == 8


def test_a_cache_of_another_training_is_left_for_another_folder(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Doing what the refusal says lets the same training go on."""
    prune_checkpoint(tiny_folder, [1, 2], tmp_path / "student", progress=False)

    def run(out: str, view: str, top_k: int) -> Distillation:
        fixed = {"teacher": str(tiny_folder), "data": str(text_file), "max_steps": 2}
        config = settings(**fixed, top_k=top_k, cache_teacher=str(tmp_path / view))
        return distill_checkpoint(tmp_path / "student", tmp_path / out, config)

    run("one", "view", 8)
    with pytest.raises(ValueError, match=r"other settings \(top_k\); choose another folder \(--cache-teacher\)"):
        run("two", "view", 4)
    assert run("two", "other", 4).steps == 2


def test_what_the_view_cannot_give_is_refused() -> None:
    for changes in ({"on_policy": 0.5}, {"hidden_states": 1.0}):
        with pytest.raises(ValueError, match=r"--cache-teacher .* leave out --"):
            settings(cache_teacher="view", **changes)
