"""Distillation from checkpoint to checkpoint: what it leaves, resuming, refusals, its command."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import save_tiny
from students import TWO_PROCESSES, samples, settings

from blockspin.config import CompressConfig
from blockspin.data.calibration import load_calibration
from blockspin.distillation import preflight
from blockspin.distillation import trainer as training
from blockspin.distillation.run import Distillation, distill, distill_checkpoint, last_checkpoint
from blockspin.evaluation.perplexity import Evaluation
from blockspin.pipeline.compress import compress
from blockspin.pipeline.stages import load_samples
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.training import DistillConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def student_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    prune_checkpoint(tiny_folder, [1, 2], tmp_path / "student", progress=False)
    return tmp_path / "student"


@pytest.fixture
def run(tiny_folder: Path, text_file: Path, student_folder: Path) -> Callable[..., Distillation]:
    def start(out: Path, student: Path = student_folder, **changes: Any) -> Distillation:
        config = settings(teacher=str(tiny_folder), data=str(text_file), **changes)
        return distill_checkpoint(student, out, config)

    return start


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = tf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return weights


def test_the_result_is_a_plain_checkpoint(
    run: Callable[..., Distillation],
    tiny_folder: Path,
    student_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    result = run(tmp_path / "out", hidden_states=0.1)
    assert "shards" not in capsys.readouterr().err  # no bar of transformers' for its checkpoints
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(path.name for path in student_folder.iterdir()),
        "distillation.json",
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (student_folder / "config.json").read_bytes()
    assert not (tmp_path / "out-training").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without 2 of its 4 blocks" in card
    assert f"{result.before['kl']:.4f} nats a token before and {result.after['kl']:.4f} after" in card
    assert str(tmp_path) not in card
    about = json.loads((tmp_path / "out" / "blockspin.json").read_text())
    assert about["kept"] == [0, 3]
    assert about["distillation"]["after"] == result.after
    before, after = weights_of(student_folder), weights_of(tmp_path / "out")
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_weights_keep_the_dtype_and_the_ties_of_the_student(
    run: Callable[..., Distillation], tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = True
    tied = tf.AutoModelForCausalLM.from_config(model.config).bfloat16()
    tied.save_pretrained(tmp_path / "tied")
    tf.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "tied")
    (tmp_path / "tied" / "README.md").write_text("---\nlicense: mit\n---\nIt scores 99.9 on all.\n")
    run(tmp_path / "out", student=tmp_path / "tied", max_steps=2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "# tied, trained to follow" in card
    assert "99.9" not in card
    stored, before = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "tied"))
    assert {name: tensor.dtype for name, tensor in stored.items()} == {name: t.dtype for name, t in before.items()}


class Killed(Exception):
    pass


def test_a_killed_run_continues_and_ends_as_an_unbroken_one(
    run: Callable[..., Distillation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = run(tmp_path / "unbroken")
    train = training.DistillationTrainer.training_step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise Killed
        return train(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training.DistillationTrainer, "training_step", killed)
        with pytest.raises(Killed):
            run(tmp_path / "out")
    folder = tmp_path / "out-training"
    assert not (tmp_path / "out").exists()
    assert last_checkpoint(folder) == str(folder / "checkpoint-3")
    (folder / "checkpoint-4").mkdir()  # killed while it was being written
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path / "out", learning_rate=1.0)
    resumed = run(tmp_path / "out")
    assert (resumed.before, resumed.after) == (unbroken.before, unbroken.after)
    losses = [[row["loss"] for row in result.history if "loss" in row] for result in (resumed, unbroken)]
    assert losses[0][-1] == losses[1][-1]
    torch.testing.assert_close(weights_of(tmp_path / "out"), weights_of(tmp_path / "unbroken"), rtol=0, atol=0)


def test_adapters_are_merged(run: Callable[..., Distillation], student_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = run(tmp_path / "out", lora_rank=2, max_steps=12)
    assert result.after["kl"] < result.before["kl"]
    before, after = weights_of(student_folder), weights_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], tol=1e-6) <= 2


@pytest.mark.parametrize("packs", [False, True])
def test_a_quantised_teacher_does_not_leak(
    packs: bool, tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels that processors with AVX512-BF16 get, and with the others'."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if packs and not bitsandbytes.nn.modules.has_avx512bf16():
        pytest.skip("needs AVX512-BF16")
    if not packs:
        monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)

    # Wide enough that some layers can be packed: 64 inputs, and 96 to the last layer of the feed-forward part.
    config = tf.AutoConfig.from_pretrained(tiny_folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 96, 16
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(teacher)
    tf.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(teacher)
    prune_checkpoint(teacher, [1, 2], student, progress=False)

    def trained(out: Path, quantization: str) -> Distillation:
        changes = {"max_steps": 2, "teacher_quantization": quantization}
        return distill_checkpoint(student, out, settings(teacher=str(teacher), data=str(text_file), **changes))

    plain, quantised = trained(tmp_path / "plain", "none"), trained(tmp_path / "out", "nf4")
    assert quantised.before["kl"] != plain.before["kl"]  # the teacher did change
    assert "quant" not in (tmp_path / "out" / "config.json").read_text()
    assert {t.dtype for t in weights_of(tmp_path / "out").values()} == {torch.float32}
    assert weights_of(tmp_path / "out").keys() == weights_of(student).keys()


def test_training_is_reported_to_tensorboard(run: Callable[..., Distillation], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path / "out", max_steps=2, report_to=("tensorboard",))
    assert list((tmp_path / "out-logs").rglob("events.*"))


def test_bad_input_is_refused_before_anything_is_written(
    run: Callable[..., Distillation], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny(tmp_path / "other", vocabulary=320)
    refused: list[tuple[str, dict[str, Any]]] = [
        (r"vocabularies differ: 320 .* 300", {"student": other}),
        ("32 tokens|100 tokens and the student takes 64; lower --max-length", {"max_length": 100}),
        ("no blockspin.json", {"student": tiny_folder, "hidden_states": 1.0}),
        ("no blockspin.json .*--train neighbours", {"student": tiny_folder, "train": "neighbours"}),
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused += [("needs bitsandbytes: pip", {"teacher_quantization": "nf4"}), ("needs peft: pip", {"lora_rank": 4})]
    for message, changes in refused:
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "out", **changes)
    monkeypatch.setattr(preflight, "free_memory", lambda: 2.0**20)
    with pytest.raises(ValueError, match=r"no room for both models: .* GiB are needed .* 0.0 GiB are free"):
        run(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        run(tmp_path / "full")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out-training").exists()


def test_models_that_are_taken_for_each_other_are_refused(
    run: Callable[..., Distillation], tiny_folder: Path, student_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    swapped = settings(teacher=str(student_folder), data=str(text_file))
    with pytest.raises(ValueError, match=r"taken for each other; give .* the original as the teacher"):
        distill_checkpoint(tiny_folder, tmp_path / "out", swapped)
    with pytest.raises(ValueError, match="is student and teacher; give a shortened model first"):
        run(tmp_path / "out", student=tiny_folder)
    assert not list(tmp_path.glob("out*"))

    student, teacher = map(tf.AutoModelForCausalLM.from_pretrained, (student_folder, tiny_folder))
    with pytest.raises(ValueError, match="taken for each other"):
        distill(teacher, student, samples(4), samples(2), config=settings())


def test_a_corrected_call_runs_after_a_refused_one(
    run: Callable[..., Distillation], tiny_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "too short"}\n')
    mistaken = settings(teacher=str(tiny_folder), data=str(tmp_path / "short.jsonl"), max_steps=2)
    with pytest.raises(ValueError, match="window"):
        distill_checkpoint(student_folder, tmp_path / "out", mistaken)
    assert run(tmp_path / "out", max_steps=2).steps == 2


def test_tokenizers_must_agree(run: Callable[..., Distillation], student_folder: Path, tmp_path: Path) -> None:
    path = student_folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"@@":').replace('"b":', '"a":').replace('"@@":', '"b":'))
    with pytest.raises(ValueError, match="tokenizers of student and teacher"):
        run(tmp_path / "out")


def test_the_whole_workflow_in_one_call(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockspin.pipeline import compress as pipeline

    small: dict[str, Any] = {"selection_samples": 8, "evaluation_samples": 8, "max_length": 32, "states": 6}
    training = DistillConfig(batch_size=4, max_steps=6, learning_rate=3e-3)
    config = CompressConfig(str(tiny_folder), str(text_file), 2, **small, distill=training)
    left_out: list[range] = []

    def watched(*args: Any, leave_out: range) -> Distillation:
        left_out.append(leave_out)
        return distill_checkpoint(*args, leave_out=leave_out)

    monkeypatch.setattr(pipeline, "distill_checkpoint", watched)
    rows = compress(config, tmp_path / "run")
    assert [row.name for row in rows][-1] == "distilled"
    assert rows[-1].loss != rows[2].loss
    assert rows[-1].num_parameters == rows[2].num_parameters
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    drawn = load_calibration(text_file, tokenizer, num_samples=60, max_length=32, progress=False)
    evaluation = load_samples(config, tokenizer, tf.AutoConfig.from_pretrained(tiny_folder)).evaluation
    assert [drawn[i].tolist() for i in left_out[0]] == [sample.tolist() for sample in evaluation]
    again = compress(config, tmp_path / "run")
    assert len(left_out) == 1
    assert again == rows


def test_settings_of_the_training_come_from_the_command_line(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from blockspin.cli import app
    from blockspin.pipeline import compress as pipeline

    seen: list[CompressConfig] = []

    def noted(config: CompressConfig, out: Path) -> list[Evaluation]:
        seen.append(config)
        return []

    monkeypatch.setattr(pipeline, "compress", noted)
    command = ["compress", str(tiny_folder), "--remove", "2", "--calibration", str(text_file)]
    for extra in (["--distill"], ["--distill-max-steps", "7", "--batch-size", "3"], []):
        CliRunner().invoke(app, [*command, *extra])
    assert [config.distill for config in seen] == [DistillConfig(), DistillConfig(max_steps=7), None]
    seen[1].save(tmp_path / "settings.yaml")
    assert CompressConfig(**CompressConfig.read(tmp_path / "settings.yaml")) == seen[1]
    (tmp_path / "settings.yaml").write_text("distill: {max_stepps: 3}\n")
    with pytest.raises(ValueError, match="distill has unknown settings: max_stepps"):
        CompressConfig("m", "c", 2, **CompressConfig.read(tmp_path / "settings.yaml"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("distill-*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_settings_are_valid(path: Path) -> None:
    config = DistillConfig(**DistillConfig.read(path))
    assert config.teacher
    assert config.data


def command(student: Path, out: Path, teacher: Path, text: Path, *options: object) -> list[str]:
    fixed = ["distill", student, "--out", out, "--teacher", teacher, "--data", text, "--max-length", 32]
    fixed += ["--log-steps", 1, "--save-steps", 3, "--learning-rate", 3e-3, "--validation-split", 0.1]
    return [*map(str, [*fixed, *options])]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "distillation.json").read_text())
    return [row[name] for row in history for name in ("loss", "eval_kl", "eval_perplexity") if name in row]


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_folder: Path, text_file: Path, student_folder: Path, tmp_path: Path) -> None:
    one = command(student_folder, tmp_path / "one", tiny_folder, text_file, "--batch-size", 8, "--max-steps", 6)
    two = command(student_folder, tmp_path / "two", tiny_folder, text_file, "--batch-size", 4, "--max-steps", 6)
    subprocess.run([sys.executable, "-m", "blockspin", *one], check=True)
    subprocess.run([sys.executable, *TWO_PROCESSES, "-m", "blockspin", *two], check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    torch.testing.assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_process_killed_for_good_continues(
    tiny_folder: Path, text_file: Path, student_folder: Path, tmp_path: Path
) -> None:
    options = ("--batch-size", 4, "--max-steps", 40, "--num-epochs", 9)
    commands = {
        name: [sys.executable, "-m", "blockspin", *command(student_folder, tmp_path / name, tiny_folder, text_file)]
        + [str(option) for option in options]
        for name in ("unbroken", "killed")
    }
    subprocess.run(commands["unbroken"], check=True)
    process = subprocess.Popen(commands["killed"])
    while process.poll() is None and last_checkpoint(tmp_path / "killed-training") is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(commands["killed"], check=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
