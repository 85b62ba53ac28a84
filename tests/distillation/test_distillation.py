"""Distillation: the loss against few-line references, training against itself in other ways, and what it leaves."""

from __future__ import annotations

import copy
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
from conftest import VOCABULARY, random_samples, save_tiny, tiny_model
from tiny import tiny_config, tiny_random_model
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from blockspin.config import CompressConfig, DistillConfig
from blockspin.data.calibration import load_calibration
from blockspin.data.packing import Windows, pack, write_windows
from blockspin.distillation import preflight
from blockspin.distillation import trainer as training
from blockspin.distillation.loss import DistillationLoss, split, training_forward
from blockspin.distillation.run import Distillation, distill, distill_checkpoint, last_checkpoint
from blockspin.pipeline import compress
from blockspin.stages import load_samples
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.memory import remove_blocks

ROOT = Path(__file__).parents[2]
Losses = dict[str, torch.Tensor]


def pair(family: str = "llama") -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    return tiny_model(family, seed=1), tiny_model(family, seed=2)


def ragged() -> dict[str, torch.Tensor]:
    """Two rows, of 11 and 7 tokens."""
    token_ids = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(token_ids)
    mask[1, 7:] = 0
    return {"input_ids": token_ids, "attention_mask": mask}


def losses_of(
    student: tf.PreTrainedModel, teacher: tf.PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any
) -> Losses:
    """The objective's losses; the gradient of the sum of the KL is left in the student."""
    with split(student) as ours, split(teacher) as theirs, training_forward(DistillationLoss(ours, theirs, **options)):
        losses: Losses = student(**inputs)
        losses["kl"].sum().backward()
    return losses


def reference_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    wanted, found = (log_softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_are_those_of_the_full_logits(family: str, temperature: float) -> None:
    (student, teacher), inputs = pair(family), ragged()
    found = losses_of(student, teacher, inputs, chunk_tokens=5, temperature=temperature)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad(set_to_none=True)
    logits, target = student(**inputs).logits, teacher(**inputs).logits.detach()
    kl = reference_kl(logits, target, temperature) * inputs["attention_mask"]
    kl.sum().backward()
    torch.testing.assert_close(found["kl"], kl)
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5)
    for row, length in enumerate([11, 7]):
        labels = inputs["input_ids"][row, 1:length]
        expected = cross_entropy(logits[row, : length - 1], labels, reduction="none")
        torch.testing.assert_close(found["cross_entropy"][row, : length - 1], expected)
        assert not found["cross_entropy"][row, length - 1 :].any()


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere", "gemma3n_text", "mamba2", "opt", "bloom"])
def test_heads_that_scale_or_cap_their_logits_run_apart(model_type: str) -> None:
    model = tiny_random_model(tiny_config(model_type))
    inputs = {"input_ids": ragged()["input_ids"]}
    with split(model) as halves, torch.no_grad():
        assert halves.is_split
        found = halves.logits(halves.hidden(**inputs).flatten(0, 1))
    torch.testing.assert_close(found, model(**inputs).logits.flatten(0, 1).detach())


class Centred(tf.LlamaForCausalLM):
    """Its logits depend on the whole sequence, so its head cannot be run on some of the tokens."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(dim=1, keepdim=True)
        return output


def test_a_head_that_cannot_run_apart_is_run_whole(capsys: pytest.CaptureFixture[str]) -> None:
    (student, teacher), inputs = pair(), {"input_ids": ragged()["input_ids"]}
    student.__class__ = Centred
    found = losses_of(student, teacher, inputs, chunk_tokens=3)
    torch.testing.assert_close(found["kl"], reference_kl(student(**inputs).logits, teacher(**inputs).logits))
    assert "all its logits are held at once" in capsys.readouterr().err
    assert "forward" not in vars(student) | vars(student.model)


def test_only_the_most_probable_tokens_of_the_teacher_count() -> None:
    (student, teacher), inputs = pair(), {"input_ids": ragged()["input_ids"]}
    found = losses_of(student, teacher, inputs, top_k=4)["kl"].detach()
    ours, theirs = student(**inputs).logits.softmax(-1), teacher(**inputs).logits.softmax(-1)
    for row, place in [(0, 0), (1, 4), (0, 10)]:
        p, q = theirs[row, place].tolist(), ours[row, place].tolist()
        top = sorted(range(VOCABULARY), key=lambda token: -p[token])[:4]
        p, q = ([*(values[token] for token in top), 1 - sum(values[token] for token in top)] for values in (p, q))
        expected = sum(a * float(torch.log(torch.tensor(a / b))) for a, b in zip(p, q, strict=True))
        assert float(found[row, place]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_hidden_states_are_compared_after_the_kept_blocks() -> None:
    teacher, inputs = tiny_model("llama"), ragged()
    student = copy.deepcopy(remove_blocks(teacher, [1]))
    with torch.no_grad():
        student.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    found = losses_of(student, teacher, inputs, kept=[0, 2, 3])["hidden"].detach()
    captured: list[torch.Tensor] = []
    layers = [*(student.model.layers[i] for i in range(3)), *(teacher.model.layers[i] for i in (0, 2, 3))]
    handles = [layer.register_forward_hook(lambda m, a, output: captured.append(output)) for layer in layers]
    with torch.no_grad():
        student(**inputs)
        teacher(**inputs)
    for handle in handles:
        handle.remove()
    ours, theirs = torch.stack(captured[:3]), torch.stack(captured[3:])
    expected = (ours - theirs).norm(dim=-1) ** 2 / theirs.norm(dim=-1) ** 2
    torch.testing.assert_close(found, expected.mean(0) * inputs["attention_mask"])
    assert not expected[0].any()
    assert expected[2].all()


class Largest(TorchDispatchMode):
    """The most elements that any result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_all_tokens_are_never_held() -> None:
    config = tf.LlamaConfig(
        vocab_size=4000, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    student, teacher = (tf.AutoModelForCausalLM.from_config(config) for _ in range(2))
    inputs = {"input_ids": torch.randint(0, 4000, (4, 64))}
    with Largest() as largest:
        losses_of(student, teacher, inputs, chunk_tokens=32)
    weights = 4000 * 16
    assert largest.elements == max(32 * 4000, weights)


def samples(number: int, length: int = 12, seed: int = 3) -> list[torch.Tensor]:
    return random_samples((length,) * number, seed)


def settings(**changes: Any) -> DistillConfig:
    """Small and fast; the models have 64 positions at most."""
    values = {"max_length": 32, "batch_size": 4, "learning_rate": 3e-3, "log_steps": 2, "max_steps": 8, "save_steps": 3}
    return DistillConfig(**{**values, "validation_split": 0.1, **changes})


def shortened(seed: int = 0) -> tuple[tf.PreTrainedModel, tf.PreTrainedModel]:
    teacher = tiny_model("llama", seed=seed)
    return copy.deepcopy(remove_blocks(teacher, [1, 2])), teacher


def test_training_brings_the_student_closer_and_leaves_the_teacher() -> None:
    student, teacher = shortened()
    weights = {name: p.clone() for name, p in teacher.named_parameters()}
    result = distill(student, teacher, samples(128), samples(8, seed=4), config=settings(max_steps=32))
    held_out = torch.stack(samples(8, seed=4))
    with torch.no_grad():
        kl = reference_kl(student(held_out).logits, teacher(held_out).logits).mean()
        loss = cross_entropy(student(held_out).logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
    assert result.after["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert result.after["kl"] < 0.7 * result.before["kl"]
    assert result.after["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    torch.testing.assert_close(dict(teacher.named_parameters()), weights, rtol=0, atol=0)
    assert all(p.requires_grad for p in teacher.parameters())
    reports = [row for row in result.history if "loss" in row]
    assert all(row["kl"] == pytest.approx(row["loss"], rel=1e-4) for row in reports)
    assert all(row["tokens_per_second"] > 0 for row in reports)


def test_the_loss_is_the_mean_over_all_tokens_of_a_step() -> None:
    """Padding and the division of a step into passes change nothing."""
    lengths = (12, 3, 7, 5, 9, 2, 11, 4)
    trained = []
    for batch_size, accumulation in [(8, 1), (2, 4)]:
        student, teacher = shortened()
        config = settings(
            batch_size=batch_size, gradient_accumulation=accumulation, max_steps=3, num_epochs=3, cross_entropy=0.5
        )
        result = distill(student, teacher, random_samples(lengths), samples(2), config=config)
        trained.append((student.state_dict(), result.history[1]["loss"]))
    torch.testing.assert_close(trained[0][0], trained[1][0], rtol=1e-3, atol=1e-5)
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-4)


def test_the_mixed_loss_is_the_weighted_sum() -> None:
    student, teacher = shortened()
    rows = samples(4)
    inputs = {"input_ids": torch.stack(rows)}
    parts = losses_of(copy.deepcopy(student), teacher, inputs, kept=[0, 3])
    expected = parts["kl"].mean() + 0.5 * parts["cross_entropy"][:, :-1].mean() + 2 * parts["hidden"].mean()
    config = settings(max_steps=1, cross_entropy=0.5, hidden_states=2.0, log_steps=1)
    result = distill(student, teacher, rows, samples(2), config=config, kept=[0, 3])
    assert result.history[1]["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    weights = []
    for checkpointing in (False, True):
        student, teacher = shortened()
        config = settings(gradient_checkpointing=checkpointing, hidden_states=1.0, max_steps=3)
        distill(student, teacher, samples(16), samples(2), config=config, kept=[0, 3])
        weights.append(student.state_dict())
    torch.testing.assert_close(weights[0], weights[1])


def test_samples_are_packed_one_after_another() -> None:
    rows = [[1, 2, 3], [4, 5, 9], [6], [7, 8, 1, 2, 3, 4, 5]]
    flat = [1, 2, 3, 9, 4, 5, 9, 6, 9, 7, 8, 1, 2, 3, 4, 5, 9]
    assert list(pack(rows, 4, 9)) == [flat[i : i + 4] for i in range(0, 16, 4)]


def test_packed_text_leaves_out_samples_and_stops_at_the_limit(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    whole = load_calibration(text_file, tokenizer, num_samples=60, max_length=10**4, progress=False)
    options: dict[str, Any] = {"length": 16, "leave_out": range(2, 5), "progress": False}
    write_windows(text_file, tokenizer, tmp_path / "all", limit=10**6, **options)
    write_windows(text_file, tokenizer, tmp_path / "some", limit=3, **options)
    rows = [sample.tolist() for i, sample in enumerate(whole) if i not in range(2, 5)]
    expected = list(pack(rows, 16, tokenizer.eos_token_id))
    found = Windows(tmp_path / "all", 16)
    assert [found[i]["input_ids"].tolist() for i in range(len(found))] == expected
    assert Windows(tmp_path / "some", 16).rows.tolist() == expected[:3]


def test_conversations_are_packed_with_the_chat_template(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "a few words"}, {"role": "assistant", "content": "to learn from"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) * 1 + "\n")
    write_windows(tmp_path / "chat.jsonl", tokenizer, tmp_path / "rows", length=2, limit=99, progress=False)
    text = tokenizer.decode(Windows(tmp_path / "rows", 2).rows.flatten())
    assert text.startswith("<user>a few words<assistant>to learn")


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
    return tf.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_result_is_a_plain_checkpoint(
    run: Callable[..., Distillation], tiny_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    result = run(tmp_path / "out", hidden_states=0.1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(path.name for path in student_folder.iterdir()),
        "distillation.json",
    }
    assert (tmp_path / "out" / "config.json").read_bytes() == (student_folder / "config.json").read_bytes()
    assert not (tmp_path / "out-training").exists()
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
    run(tmp_path / "out", student=tmp_path / "tied", max_steps=2)
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
    ]
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
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


def test_shared_weights_are_refused() -> None:
    teacher = tiny_model("llama")
    with pytest.raises(ValueError, match="share weights"):
        distill(remove_blocks(teacher, [1]), teacher, samples(8), samples(2), config=settings())


def test_the_memory_estimate_counts_what_the_models_hold() -> None:
    """Against the bytes of a real model, its gradients and AdamW's state."""
    model = tiny_model("llama")
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimiser = torch.optim.AdamW(model.parameters())
    optimiser.step()
    parameters = sum(p.numel() for p in model.parameters())
    estimate = preflight.memory_estimate(parameters, parameters, VOCABULARY, settings(dtype="float32"), 1)
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert estimate["student"] == sum(p.nbytes for p in model.parameters())
    assert estimate["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert estimate["optimiser"] == sum(moment.nbytes for moment in moments)
    sharded = preflight.memory_estimate(parameters, parameters, VOCABULARY, settings(dtype="float32"), 4)
    assert sharded["optimiser"] * 4 == estimate["optimiser"]
    assert sharded["teacher"] == estimate["teacher"]


def test_a_loss_that_is_not_a_number_ends_the_training() -> None:
    student, teacher = shortened()
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="loss is nan at step 2; train with a lower --learning-rate"):
        distill(student, teacher, samples(32), samples(2), config=settings())


def test_a_rising_loss_is_noticed_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = training.ReportCallback(quiet=True)
    state = type("State", (), {"global_step": 70})
    arguments = type("Arguments", (), {"learning_rate": 0.5})
    for loss in (3.0, 1.0, 1.1, 0.9, 1.2, 1.0, 0.8):
        watch.on_log(arguments, state, None, {"loss": loss})
    assert "risen" not in capsys.readouterr().err
    for _ in range(8):
        watch.on_log(arguments, state, None, {"loss": 2.0})
    assert " ".join(capsys.readouterr().err.split()).count("the learning rate 0.5 may be too high") == 1


def test_the_whole_workflow_in_one_call(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockspin import pipeline

    small = {"selection_samples": 8, "evaluation_samples": 8, "max_length": 32, "states": 6}
    training = {"batch_size": 4, "max_steps": 6, "learning_rate": 3e-3}
    config = CompressConfig(str(tiny_folder), str(text_file), 2, **small, distill=training)
    left_out: list[range] = []
    original = pipeline.distill_checkpoint

    def watched(*args: Any, leave_out: range) -> Distillation:
        left_out.append(leave_out)
        return original(*args, leave_out=leave_out)

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

    from blockspin import pipeline
    from blockspin.cli import app

    seen: list[CompressConfig] = []
    monkeypatch.setattr(pipeline, "compress", lambda config, out: seen.append(config) or [])
    seen[0].save(tmp_path / "settings.yaml") if seen else None
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


TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


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


SHARDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from blockspin.distillation.loss import DistillationLoss, split, training_forward

torch.distributed.init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), torch.distributed.get_rank()
teacher, whole, sharded = tiny_model("llama", seed=2), tiny_model("llama", seed=1), tiny_model("llama", seed=1)
token_ids = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(0))
for student, rows in ((whole, token_ids), (sharded, token_ids[2 * rank : 2 * rank + 2])):
    with split(student) as ours, split(teacher) as theirs:
        with training_forward(DistillationLoss(ours, theirs, chunk_tokens=5, kept=[0, 1, 2, 3])):
            if student is sharded:
                for layer in student.model.layers:
                    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
                fully_shard(student, mesh=mesh, reshard_after_forward=True)
            losses = student(input_ids=rows)
            (losses["kl"].mean() + losses["hidden"].mean()).backward()
for a, b in zip(whole.parameters(), sharded.parameters(), strict=True):
    torch.testing.assert_close(b.grad.full_tensor(), a.grad, rtol=1e-3, atol=1e-5)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_a_student_sharded_by_fsdp_gets_the_same_gradients(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    here = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, *TWO_PROCESSES, str(tmp_path / "sharded.py"), here], check=True)
