"""Answers of the teacher and continuations of the student, against sampling by hand and against each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import random_samples, tiny_model
from students import samples, settings, shortened

from blockspin.data.packing import write_packed
from blockspin.distillation import data, generation
from blockspin.distillation.generation import generate_answers
from blockspin.distillation.loss import DistillationLoss, split, training_forward
from blockspin.distillation.run import Distillation, distill, distill_checkpoint
from blockspin.model.generation import continued
from blockspin.surgery.checkpoint import prune_checkpoint

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}a: {% endif %}"
END = 2


def writer() -> tf.PreTrainedModel:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = END
    return model


def test_tokens_are_drawn_from_the_models_own_distribution() -> None:
    """Against a loop that draws from the softmax of the last logits, without a cache."""
    model, prompts = writer(), random_samples((5, 5, 5))
    found = continued(model, prompts, max_new_tokens=6, seed=7)
    rows = torch.stack(prompts)
    torch.manual_seed(7)
    with torch.no_grad():
        for _ in range(6):
            drawn = torch.multinomial(model(input_ids=rows).logits[:, -1].softmax(-1), 1)
            rows = torch.cat([rows, drawn], dim=1)
    for row, expected in zip(found, rows.tolist(), strict=True):
        answer = expected[5:]
        whole = answer.index(END) + 1 if END in answer else 6
        assert row == expected[: 5 + whole]


def test_padding_changes_no_distribution() -> None:
    """A model that is certain of every token writes the same in a batch of prompts of all lengths as alone."""
    model, prompts = writer(), random_samples((9, 3, 6))
    model.lm_head.weight.data.mul_(1e4)
    together = continued(model, prompts, max_new_tokens=5, seed=0)
    assert together == [continued(model, [prompt], max_new_tokens=5, seed=1)[0] for prompt in prompts]


def test_the_global_random_numbers_are_left_alone() -> None:
    model = writer()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    continued(model, random_samples((4,)), max_new_tokens=3, seed=5)
    assert torch.equal(torch.rand(1), expected)


def test_answers_continue_after_an_interruption_and_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = writer(), [row.tolist() for row in random_samples((4, 7, 5, 6, 3))]
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 3, "batch_size": 2, "progress": False}
    expected = generate_answers(model, prompts, **options)
    assert [row[: len(prompt)] for row, prompt in zip(expected, prompts, strict=True)] == prompts

    partial = tmp_path / "answers.jsonl"
    assert generate_answers(model, prompts, **options, partial=partial) == expected
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:2]))  # the identity and the first group
    calls = []

    def counted(*args: Any) -> list[list[int]]:
        calls.append(args)
        return continued(*args)

    monkeypatch.setattr(generation, "continued", counted)
    assert generate_answers(model, prompts, **options, partial=partial) == expected
    assert len(calls) == 2
    with pytest.raises(ValueError, match="another model, other samples or other settings"):
        generate_answers(model, prompts, **{**options, "seed": 4}, partial=partial)


def test_a_student_in_training_generates_as_itself() -> None:
    student, teacher = shortened()
    prompts = random_samples((6, 6))
    expected = continued(copy.deepcopy(student), prompts, max_new_tokens=5, seed=0)
    ours = split(student)
    with training_forward(DistillationLoss(ours, split(teacher))):
        with ours.whole():
            assert continued(student, prompts, max_new_tokens=5, seed=0) == expected
        assert "kl" in student(input_ids=torch.stack(prompts))


def test_on_policy_training_sees_what_the_student_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the batches: the first half of each window is the text's, the rest the student's."""
    student, teacher = shortened()
    text = samples(32)
    seen: list[list[int]] = []
    forward = DistillationLoss.__call__

    def watched(self: DistillationLoss, **inputs: Any) -> Any:
        if torch.is_grad_enabled():
            seen.extend(inputs["input_ids"].tolist())
        return forward(self, **inputs)

    monkeypatch.setattr(DistillationLoss, "__call__", watched)
    result = distill(student, teacher, text, samples(4, seed=4), config=settings(on_policy=0.5, divergence="js"))
    known = {tuple(row.tolist()) for row in text}
    beginnings = {row[:6] for row in known}
    assert len(seen) == 32
    assert {tuple(row[:6]) for row in seen} == beginnings
    assert sum(tuple(row) in known for row in seen) == 16
    assert result.after["kl"] < result.before["kl"]


@pytest.fixture
def chat(tiny_folder: Path, tmp_path: Path) -> Path:
    """Conversations; the tokenizers of both models get a chat template."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny_folder)
    rows = []
    for number in range(40):
        turns = [("user", f"a {number % 7}"), ("assistant", "no"), ("user", "d"), ("assistant", "last")]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns[: 2 + number % 3]]})
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(tiny_folder: Path, data: Path | str, out: Path, **changes: Any) -> Distillation:
    if not (out.parent / "student").exists():
        prune_checkpoint(tiny_folder, [1, 2], out.parent / "student", progress=False)
    return distill_checkpoint(
        out.parent / "student", out, settings(teacher=str(tiny_folder), data=str(data), **{"max_length": 64, **changes})
    )


def test_the_teachers_answers_replace_those_of_the_data(
    tiny_folder: Path, chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[list[int]] = []

    def watched(rows: list[list[int]], *args: Any) -> None:
        written.extend(rows)
        write_packed(rows, *args)

    monkeypatch.setattr(data, "write_packed", watched)
    result = trained(tiny_folder, chat, tmp_path / "out", self_generated=30, answer_tokens=8, max_steps=3)
    assert result.steps == 3
    assert len(written) == 30
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    short = {f"u: a {number}\na: " for number in range(7)}
    long = {f"{prompt}no\nu: d\na: " for prompt in short}  # the first answer is what the second question is about
    for row in written:
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in (*short, *long)]
        assert any(tokenizer.decode(row[:length]) in short | long for length in lengths)


def test_what_cannot_be_answered_is_refused(
    tiny_folder: Path, chat: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, text: Path | str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            trained(tiny_folder, text, tmp_path / "out", **{"self_generated": 5, **changes})
        assert not (tmp_path / "out").exists()

    refused("has the fields text, and prompts are made of `messages`", text_file)
    refused("is a mixture; --self-generated needs one source of conversations", f"{chat},{text_file}")
    refused("no prompt of at most 2 tokens", chat, max_length=4)
    monkeypatch.setattr(tf.PreTrainedModel, "can_generate", lambda self: False)
    refused("cannot generate text; leave out --self-generated and --on-policy", chat)
