"""Datasets become files of full token windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers as tf

from blockspin.data.calibration import load_calibration
from blockspin.data.packing import Windows, pack, write_windows


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
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    write_windows(tmp_path / "chat.jsonl", tokenizer, tmp_path / "rows", length=2, limit=99, progress=False)
    text = tokenizer.decode(Windows(tmp_path / "rows", 2).rows.flatten())
    assert text.startswith("<user>a few words<assistant>to learn")
