"""Training in memory: against the loss by hand, and in other ways that must come to the same."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, random_samples, tiny_model
from students import losses_of, reference_kl, samples, settings, shortened
from torch.nn.functional import cross_entropy

from blockspin.distillation import preflight
from blockspin.distillation import trainer as training
from blockspin.distillation.run import distill
from blockspin.distillation.trained import learning_rate
from blockspin.surgery.memory import remove_blocks
from blockspin.training import DistillConfig


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


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("neighbours", [f"layers.{i}." for i in (0, 1)]),  # 1 of 4 blocks is gone
        ("norms-and-projections", ["norm", "o_proj", "down_proj"]),
    ],
)
def test_only_the_chosen_weights_change(train: str, expected: list[str]) -> None:
    teacher = tiny_model("llama")
    student = copy.deepcopy(remove_blocks(teacher, [1]))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    distill(student, teacher, samples(16), samples(2), config=settings(train=train, max_steps=3), kept=[0, 2, 3])
    for name, p in student.named_parameters():
        assert torch.equal(p, before[name]) != any(part in name for part in expected), name
        assert p.requires_grad


def test_the_learning_rate_falls_with_the_width() -> None:
    """The paper's for models of its width, and about what was found on the embedded model, of width 96."""
    widths = {4096: 2e-5, 96: 3e-3}
    for width, best in widths.items():
        config = tf.LlamaConfig(hidden_size=width)
        assert learning_rate(DistillConfig(), config) == pytest.approx(best, rel=0.5)
        assert learning_rate(DistillConfig(learning_rate=0.1), config) == 0.1


def test_shared_weights_are_refused() -> None:
    teacher = tiny_model("llama")
    with pytest.raises(ValueError, match="share weights"):
        distill(remove_blocks(teacher, [1], copy=False), teacher, samples(8), samples(2), config=settings())


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


@pytest.mark.parametrize(("asked", "made"), [(8, 2), (2, 2)])
def test_steps_that_the_data_does_not_have_are_named(asked: int, made: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Two batches of four, once."""
    student, teacher = shortened()
    result = distill(student, teacher, samples(8), samples(2), config=settings(max_steps=asked))
    assert result.steps == made
    assert ("only 2 of the 8 steps" in capsys.readouterr().err) == (asked > made)
