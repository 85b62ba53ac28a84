"""Perplexity of texts and the cost of models, against a few lines of torch and what the configurations say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
import transformers as tf
from conftest import Command, tiny_model
from tiny import tiny_config, tiny_random_model

from blockspin import prune_checkpoint, remove_blocks, text_perplexity
from blockspin.evaluation.cost import Workload, costs_table, measure_costs
from blockspin.evaluation.perplexity import TextPerplexity

TEXT = "some words über and more words, in a row.\n" * 30


ModelAndTokenizer = tuple[tf.PreTrainedModel, tf.PreTrainedTokenizerBase]


@pytest.fixture
def model_and_tokenizer(tiny_folder: Path) -> ModelAndTokenizer:
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model, tf.AutoTokenizer.from_pretrained(tiny_folder)


def test_perplexity_of_a_text_in_the_standard_way(model_and_tokenizer: ModelAndTokenizer, tmp_path: Path) -> None:
    """The loop that papers on compression use: windows of the whole text, the mean of their losses."""
    model, tokenizer = model_and_tokenizer
    (tmp_path / "text.txt").write_text(TEXT)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    length, losses = 32, []
    for i in range(ids.numel() // length):
        window = ids[:, i * length : (i + 1) * length]
        with torch.no_grad():
            losses.append(model(window, labels=window).loss * length)
    expected = torch.exp(torch.stack(losses).sum() / (len(losses) * length))
    found = text_perplexity(model, tokenizer, tmp_path / "text.txt", window=length)
    assert found.perplexity == pytest.approx(float(expected), rel=1e-5)
    assert found.num_tokens == ids.numel()
    assert found.num_bytes == len(TEXT.encode()) > len(TEXT)


def test_bits_per_byte_is_the_code_length(model_and_tokenizer: ModelAndTokenizer, tmp_path: Path) -> None:
    """A text of one window: the bits that its tokens take after the first, times tokens / predicted tokens."""
    model, tokenizer = model_and_tokenizer
    text = "a few words to learn from"
    (tmp_path / "text.txt").write_text(text)
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        probabilities = model(ids[None]).logits[0].softmax(-1)
    bits = -sum(math.log2(float(probabilities[i, ids[i + 1]])) for i in range(len(ids) - 1))
    found = text_perplexity(model, tokenizer, tmp_path / "text.txt")
    assert found.bits_per_byte == pytest.approx(bits * len(ids) / (len(ids) - 1) / len(text), rel=1e-5)


def test_wikitext2_is_joined_by_blank_lines(
    model_and_tokenizer: ModelAndTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_and_tokenizer
    rows = {"text": ["", " = Title = \n", " some words to learn from \n", ""] * 8}
    asked: list[tuple[tuple[str, ...], dict[str, str]]] = []

    def load_dataset(*names: str, **options: str) -> dict[str, list[str]]:
        asked.append((names, options))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = text_perplexity(model, tokenizer, window=16)
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    (tmp_path / "joined.txt").write_text("\n\n".join(rows["text"]))
    own = text_perplexity(model, tokenizer, tmp_path / "joined.txt", window=16)
    assert (found.loss, found.num_bytes) == (own.loss, own.num_bytes)


def test_windows_are_no_longer_than_the_context(model_and_tokenizer: ModelAndTokenizer, tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer
    (tmp_path / "text.txt").write_text(TEXT)
    assert text_perplexity(model, tokenizer, tmp_path / "text.txt", window=2048).window == 64


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read the text"), ("a", "fewer than two tokens")])
def test_texts_that_cannot_be_used(
    model_and_tokenizer: ModelAndTokenizer, tmp_path: Path, content: str | None, message: str
) -> None:
    model, tokenizer = model_and_tokenizer
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        text_perplexity(model, tokenizer, path)
    assert "--text" in str(raised.value)


def test_cost_of_a_shortened_model() -> None:
    """Cache and operations by hand: two key-value heads of 8 in float32; 2 operations a weight, attention besides."""
    model = tiny_model("llama")
    shortened = remove_blocks(model, [1, 2])
    whole, short = measure_costs(
        {"whole": model, "short": shortened}, [100, 60], Workload(length=16, new_tokens=4), rounds=1, progress=False
    )
    assert (whole.cache_bytes, short.cache_bytes) == (4 * 2 * 2 * 8 * 4, 2 * 2 * 2 * 8 * 4)
    assert whole.num_parameters - short.num_parameters == sum(
        p.numel() for i in (1, 2) for p in model.model.layers[i].parameters()
    )
    head = 2 * model.lm_head.weight.numel()
    for cost, blocks in ((whole, 4), (short, 2)):
        weights = 2 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
        attention = 4 * 32  # queries with keys, and weights with values, for each position seen
        # The first and the second new token that enter the model see 17 and 18 positions.
        assert cost.decode_flops == pytest.approx(head + blocks * (weights + attention * 17.5), rel=1e-6)
        assert cost.prefill > 0
        assert cost.decode > 0
        assert cost.peak_bytes is None or cost.peak_bytes >= 4 * cost.num_parameters
    ratio = (whole.prefill_flops - head / 16) / (short.prefill_flops - head / 16)
    assert ratio == pytest.approx(2)  # without the head, which sees the last token only
    assert "| cache, bytes a token | 512 100% | 256 50% |" in costs_table([whole, short]).markdown()


def test_only_attention_has_a_cache_that_grows() -> None:
    """A hybrid of state-space, mixture and attention layers: removing a state-space layer saves no cache per token."""
    kinds = ["linear_attention", "moe", "full_attention", "linear_attention", "full_attention", "mlp"]
    model = tiny_random_model(tiny_config("nemotron_h", layers_block_type=kinds)).eval()
    models = {"whole": model, "less mamba": remove_blocks(model, [0]), "less attention": remove_blocks(model, [2])}
    costs = measure_costs(models, [1, 1, 1], Workload(length=16, new_tokens=2), rounds=1, progress=False)
    whole, less_mamba, less_attention = (cost.cache_bytes for cost in costs)
    assert whole == less_mamba == 2 * less_attention > 0


def test_prompts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"holds 64 tokens.*--length"):
        measure_costs({"m": tiny_model("llama")}, [1], Workload(length=64, new_tokens=1), progress=False)
    with pytest.raises(ValueError, match="--rounds"):
        measure_costs({"m": tiny_model("llama")}, [1], rounds=0, progress=False)


def test_evaluate_texts_and_costs_on_the_command_line(command: Command, tiny_folder: Path, tmp_path: Path) -> None:
    prune_checkpoint(tiny_folder, [1], tmp_path / "short")
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--text", tmp_path / "text.txt", "--window", 32, "--cost", "--length", 16, "--new-tokens", 2]
    code, printed = command("evaluate", tiny_folder, tmp_path / "short", *flags, "--out", tmp_path / "out.json")
    assert code == 0, printed
    rows = json.loads((tmp_path / "out.json").read_text())
    assert "scores" not in rows[0]  # tasks were not asked for
    assert rows[1]["cost"]["num_parameters"] < rows[0]["cost"]["num_parameters"]
    text = rows[0]["texts"][0]
    assert (
        TextPerplexity(text["text"], text["loss"], text["num_tokens"], text["num_bytes"], 32).perplexity
        == (text["perplexity"])
    )
    assert "bits/byte" in (tmp_path / "out.md").read_text()
    assert command("evaluate", tiny_folder, "--text", tmp_path / "absent.txt")[0] == 2
