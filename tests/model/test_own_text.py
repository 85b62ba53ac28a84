"""Text that a model writes itself, against its predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, Command, tiny_model

from blockspin.data.calibration import load_calibration
from blockspin.model.generation import continued
from blockspin.model.loading import load_model, load_tokenizer
from blockspin.model.own_text import own_text


def test_tokens_come_as_often_as_they_are_predicted() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    model.generation_config.temperature = 0.01  # of the model's own settings none counts
    samples = own_text(model, tokens=8000, length=2)
    assert all(len(sample) == 2 for sample in samples)

    with torch.no_grad():
        predicted = model(input_ids=torch.arange(VOCABULARY)[:, None]).logits[:, 0].softmax(-1)  # (first, second)
    firsts, seconds = torch.stack(samples).T
    expected = predicted[firsts].mean(0)
    found = torch.bincount(seconds, minlength=VOCABULARY) / len(seconds)
    assert float((found - expected).abs().sum()) / 2 < 0.07  # about 0.04 by chance
    assert len(set(firsts.tolist())) == VOCABULARY


def test_text_ends_where_the_model_ends_it() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [1, 5]
    samples = own_text(model, tokens=2000, length=12)
    assert sum(map(len, samples)) >= 2000
    assert any(len(sample) < 12 for sample in samples)
    for sample in samples:
        inside, last = sample[1:-1].tolist(), int(sample[-1])
        assert not {1, 5}.intersection(inside)
        assert len(sample) == 12 or last in (1, 5)


def test_what_was_written_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = tiny_model("llama"), tmp_path / "text.jsonl"
    model.generation_config.eos_token_id = None
    expected = own_text(model, tokens=3000, length=12)
    rounds = list[int]()

    def killed(model: Any, starts: Any, length: int, seed: int, batch_size: int) -> Any:
        if len(rounds) == 2:
            raise KeyboardInterrupt
        rounds.append(seed)
        return continued(model, starts, length, seed, batch_size)

    monkeypatch.setattr("blockspin.model.own_text.continued", killed)
    with pytest.raises(KeyboardInterrupt):
        own_text(model, tokens=3000, length=12, partial=file)
    rounds[:] = [-1]  # one round goes through, the next is killed
    with pytest.raises(KeyboardInterrupt):
        own_text(model, tokens=3000, length=12, partial=file)
    monkeypatch.undo()

    found = own_text(model, tokens=3000, length=12, partial=file)
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]
    assert 3000 <= sum(map(len, found)) < 3000 + 12
    with pytest.raises(ValueError, match="other settings"):
        own_text(model, tokens=2000, length=12, partial=file)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_seed_writes_the_same_and_leaves_the_generator_alone(name: str) -> None:
    model = tiny_model(name)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (own_text(model, tokens=300, length=8, seed=3) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(
        torch.equal(a, b) for a, b in zip(first, own_text(model, tokens=300, length=8, seed=4), strict=False)
    )


WRITE = ("--tokens", 1500, "--max-length", 16, "--seed", 5)


def test_the_command_writes_what_the_function_does(tiny_folder: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "own.jsonl"
    code, printed = command("write", tiny_folder, *WRITE, "--out", out)
    assert code == 0, printed

    model, tokenizer = load_model(tiny_folder), load_tokenizer(str(tiny_folder))
    samples = own_text(model, 1500, 16, seed=5)
    texts = [tokenizer.decode(sample, skip_special_tokens=True) for sample in samples]
    written = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert written == [text for text in texts if text.strip()]
    assert f"{len(written)} texts" in printed
    assert len(load_calibration(out, tokenizer, num_samples=20, max_length=16, progress=False)) == 20
    assert {path.name for path in tmp_path.glob("own*")} == {"own.jsonl"}

    code, printed = command("write", tiny_folder, *WRITE, "--out", out)
    assert (code, "exists already" in printed) == (2, True)


def test_the_command_goes_on_where_it_was(
    tiny_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("write", tiny_folder, *WRITE, "--out", tmp_path / "whole.jsonl")
    rounds = list[int]()

    def killed(model: Any, starts: Any, length: int, seed: int, batch_size: int) -> Any:
        if rounds:
            raise ValueError("the power is gone")
        rounds.append(seed)
        return continued(model, starts, length, seed, batch_size)

    with monkeypatch.context() as patched:
        patched.setattr("blockspin.model.own_text.continued", killed)
        code, _ = command("write", tiny_folder, *WRITE, "--out", tmp_path / "own.jsonl")
    assert (code, (tmp_path / "own.jsonl").exists()) == (2, False)
    assert command("write", tiny_folder, *WRITE, "--out", tmp_path / "own.jsonl")[0] == 0
    assert (tmp_path / "own.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_energies_of_a_mixture(tiny_folder: Path, text_file: Path, tmp_path: Path, command: Command) -> None:
    command("write", tiny_folder, *WRITE, "--out", tmp_path / "own.jsonl")
    both = f"{text_file},{tmp_path / 'own.jsonl'}"
    sizes = ("--energy-samples", 4, "--max-length", 16, "--energy", "secant")
    code, printed = command("energies", tiny_folder, "--calibration", both, *sizes, "--out", tmp_path / "e.safetensors")
    assert (code, "secant of 4 samples" in printed) == (0, True)
