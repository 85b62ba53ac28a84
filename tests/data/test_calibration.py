"""Datasets of every form become the same seeded samples."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import transformers as tf
from tokenizers import ByteLevelBPETokenizer

from blockspin.data.calibration import load_calibration

TEXTS = [f"sample number {i} " * (1 + i % 5) for i in range(40)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(TEXTS, 300, special_tokens=["<|end|>"])
    return tf.PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token="<|end|>")


def load(path: Path, tokenizer: tf.PreTrainedTokenizerFast, **options: object) -> list[list[int]]:
    return [s.tolist() for s in load_calibration(path, tokenizer, progress=False, **options)]


def test_every_file_format_gives_the_same_samples(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    samples = [load(path, tokenizer, num_samples=8, seed=3) for path in sorted(tmp_path.iterdir())]
    assert len(samples) == 5
    assert all(other == samples[0] for other in samples)
    assert all(tokenizer.decode(ids) in TEXTS for ids in samples[0])


def test_the_seed_decides_the_draw_and_more_samples_only_add(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert load(path, tokenizer, num_samples=8, seed=1) == load(path, tokenizer, num_samples=20, seed=1)[:8]
    assert load(path, tokenizer, num_samples=8, seed=1) != load(path, tokenizer, num_samples=8, seed=2)
    assert max(map(len, load(path, tokenizer, num_samples=40, max_length=5))) == 5


def test_conversations_of_both_forms_go_through_the_chat_template(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n"
    )
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}) + "\n"
    )
    tokenizer.chat_template = TEMPLATE
    try:
        decoded = [tokenizer.decode(load(tmp_path / name, tokenizer)[0]) for name in ("a.jsonl", "b.jsonl")]
    finally:
        tokenizer.chat_template = None
    assert decoded == ["<user>hi<assistant>ho"] * 2
    assert tokenizer.decode(load(tmp_path / "a.jsonl", tokenizer)[0]) == "hi\n\nho"


def test_a_plain_text_is_cut_into_windows(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    windows = load(tmp_path / "a.txt", tokenizer, max_length=16, num_samples=10_000)
    ids = tokenizer("".join(TEXTS))["input_ids"]
    expected = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    assert sorted(windows) == sorted(window for window in expected if len(window) >= 2)
    assert windows != expected


def test_unusable_sets_are_refused(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    cases = {
        "fields.jsonl": ('{"question": "?"}\n', r"has the fields question; it needs"),
        "short.jsonl": ('{"text": "a"}\n', r"no sample of two or more tokens"),
        "broken.jsonl": ('{"text": \n', r"cannot read the calibration set"),
        "empty.jsonl": ("", r"cannot read|no sample"),
        "empty.txt": ("", r"no sample"),
        "a.docx": ("x", r"ending must be one of"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name, tokenizer)
    with pytest.raises(ValueError, match="cannot read the calibration set"):
        load(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(ValueError, match="--num-samples"):
        load(tmp_path / "fields.jsonl", tokenizer, num_samples=0)
    with pytest.raises(ValueError, match="--max-length"):
        load(tmp_path / "fields.jsonl", tokenizer, max_length=1)


def test_real_conversations(data_folder: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    samples = load(data_folder / "chat" / "conversations.jsonl.gz", tokenizer, num_samples=50, max_length=64)
    assert len(samples) == 50
    assert all(2 <= len(sample) <= 64 for sample in samples)
