"""Datasets of every form become the same seeded samples."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import transformers as tf
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from blockspin.data.calibration import load_calibration
from blockspin.data.reading import text_pieces

TEXTS = [f"sample number {i} " * (1 + i % 5) for i in range(40)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(TEXTS, 300, special_tokens=["<|end|>"])
    return tf.PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token="<|end|>")


def load(path: str | Path, tokenizer: tf.PreTrainedTokenizerFast, **options: Any) -> list[list[int]]:
    """The samples. options: those of load_calibration."""
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
        "number.jsonl": ('{"text": 5}\n', r"row 1 .* its `text` is 5; it must be a text"),
        "nothing.jsonl": ('{"text": null}\n{"messages": []}\n', r"no sample of two or more tokens"),
        "fields.jsonl": ('{"question": "?"}\n', r"has the fields question; it needs"),
        "short.jsonl": ('{"text": "a"}\n', r"no sample of two or more tokens"),
        "broken.jsonl": ('{"text": \n', r"cannot read the data"),
        "empty.jsonl": ("", r"it holds no rows"),
        "empty.txt": ("", r"no sample"),
        "text.jsonl": (json.dumps({"messages": "hello"}), r"row 1 .* its `messages` is 'hello'; it must be a list"),
        "turns.jsonl": (json.dumps({"messages": ["hello"]}), r"one of its turns is 'hello'"),
        "image.jsonl": (json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), r"role, content"),
        "latin.txt": ("caf\udce9 au lait", r"cannot read the data"),
        "a.docx": ("x", r"ending must be one of"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name, tokenizer)
    with pytest.raises(ValueError, match="cannot read the data"):
        load(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(ValueError, match="--num-samples"):
        load(tmp_path / "fields.jsonl", tokenizer, num_samples=0)
    with pytest.raises(ValueError, match="--max-length"):
        load(tmp_path / "fields.jsonl", tokenizer, max_length=1)


def test_real_conversations(data_folder: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    samples = load(data_folder / "chat" / "conversations.jsonl.gz", tokenizer, num_samples=50, max_length=64)
    assert len(samples) == 50
    assert all(2 <= len(sample) <= 64 for sample in samples)


def test_of_a_content_in_parts_the_texts_are_taken(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    """The form of OpenAI's interface, with and without a picture in between."""
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    parts = [{"type": "text", "text": "hi"}, picture, {"type": "text", "text": "ho"}]
    (tmp_path / "parts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}) + "\n")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi\nho"}]}) + "\n")
    assert load(tmp_path / "parts.jsonl", tokenizer) == load(tmp_path / "plain.jsonl", tokenizer)


def test_a_row_that_the_chat_template_refuses_is_named(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns * 2}) + "\n"
    )
    refusing = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}" + TEMPLATE
    try:
        for template, message in (
            (refusing, "roles must alternate"),
            ("{{ messages.x.y }}", "no attribute"),
            ("{% if", ""),
        ):
            tokenizer.chat_template = template
            with pytest.raises(ValueError, match=rf"row \d of .*chat template refuses it: .*{message}"):
                load(tmp_path / "a.jsonl", tokenizer)
    finally:
        tokenizer.chat_template = None


def test_special_tokens_of_a_template_are_not_added_again(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast
) -> None:
    """Also where other rows of the file are texts, so that this one has an empty field `text`."""
    conversation = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(conversation) + "\n" + json.dumps({"text": "hi"}) + "\n")
    with_start = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>")
    with_start._tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    with_start.chat_template = TEMPLATE
    decoded = {with_start.decode(ids) for ids in load(tmp_path / "a.jsonl", with_start)}
    assert decoded == {"<user>hi", "<|end|>hi"}


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.xz", ".txt.gz", ".txt.xz"])
def test_a_compressed_file_cut_anywhere_or_damaged_is_refused(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast, ending: str
) -> None:
    compress = gzip.compress if ending.endswith("gz") else lzma.compress
    content = compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    cuts = [content[: len(content) * k // 8] for k in range(1, 8)]
    for number, broken in enumerate([*cuts, bytes(damaged), b"no archive at all"]):
        (tmp_path / f"{number}{ending}").write_bytes(broken)
        with pytest.raises(ValueError, match="cannot read the data"):
            load(tmp_path / f"{number}{ending}", tokenizer, num_samples=1)


def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockspin.data.reading.use_hub", lambda: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    for name in (
        "absent.jsonl",
        "absent.txt",
        "some/absent.parquet",
        "a/b/absent",
        str(tmp_path / "absent"),
        "./absent",
    ):
        with pytest.raises(ValueError, match="there is no such file"):
            load(Path(name) if "./" not in name else name, tokenizer)


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    highest = max(tokenizer("".join(TEXTS))["input_ids"])
    assert load(tmp_path / "a.txt", tokenizer, vocabulary=highest + 1)
    with pytest.raises(ValueError, match=f"the token {highest}, but the model knows only {highest}"):
        load(tmp_path / "a.txt", tokenizer, vocabulary=highest)


def test_a_text_read_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indented code, empty lines, runs of spaces and a long line, cut at every size of piece."""
    text = "def f(x):\n    return  x\n\n\n  \nclass A:\n\tpass \nmore words\n" * 3 + "a long line of words " * 9
    (tmp_path / "a.txt").write_text(text)
    whole = tokenizer(text)["input_ids"]
    for size in (1, 3, 7, 20, 64, 10_000):
        monkeypatch.setattr("blockspin.data.reading._PIECE", size)
        assert "".join(text_pieces(tmp_path / "a.txt")) == text
        windows = load(tmp_path / "a.txt", tokenizer, max_length=len(whole) + 1)
        assert windows == [whole]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_pieces_of_a_text_are_not_marked_as_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A tokenizer in the way of SentencePiece puts a mark before a text; it gives the tokens of the whole at once."""
    text = "the first line\nand the second one\n\n  indented, and more\nlast" * 5
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    marks, lines = pre_tokenizers.Metaspace(prepend_scheme=scheme), pre_tokenizers.Split("\n", "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([marks, lines])
    model.train_from_iterator([text], trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"]))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    (tmp_path / "a.txt").write_text(text)
    whole = tokenizer(text)["input_ids"]
    for size in (7, 20, 64):
        monkeypatch.setattr("blockspin.data.reading._PIECE", size)
        assert load(tmp_path / "a.txt", tokenizer, max_length=len(whole) + 1) == [whole]


def test_no_long_piece_of_a_text_is_tokenised_at_once(tmp_path: Path) -> None:
    """Tokenizers need a thousand bytes of memory for each character that they are given."""
    given: list[int] = []

    def tokenizer(text: str, **options: object) -> dict[str, list[int]]:
        given.append(len(text))
        return {"input_ids": [1] * len(text)}

    text = "some words in a line\n" * 50_000 + "one line without an end " * 20_000
    (tmp_path / "a.txt").write_text(text)
    samples = load_calibration(tmp_path / "a.txt", tokenizer, max_length=len(text), progress=False)
    assert [len(sample) for sample in samples] == [len(text)]
    assert max(given) < 200_000
    assert len(text) <= sum(given) < 1.001 * len(text)  # each piece with the character before it


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_several_sources_give_a_sample_in_turn(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", TEXTS[:4]), write_rows(tmp_path / "b.jsonl", TEXTS[20:])
    third = tmp_path / "c.txt"
    third.write_text(" ".join(TEXTS[10:20]))
    options = {"num_samples": 100, "max_length": 8, "seed": 3}

    alone = [load(path, tokenizer, **options) for path in (first, second, third)]
    assert list(map(len, alone))[:2] == [4, 20]
    expected = []
    for rank in range(max(map(len, alone))):  # the shortest ends first, the others go on
        expected += [samples[rank] for samples in alone if rank < len(samples)]
    assert load(f"{first}, {second},{third}", tokenizer, **options) == expected
    assert load(f"{second},{first}", tokenizer, **options)[:2] == [alone[1][0], alone[0][0]]


def test_names_of_several_sources(tmp_path: Path, tokenizer: tf.PreTrainedTokenizerFast) -> None:
    with_comma = write_rows(tmp_path / "a,b.jsonl", TEXTS[:4])
    assert len(load(with_comma, tokenizer, num_samples=4)) == 4

    write_rows(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError, match="no text before or after a comma"):
        load(f"{tmp_path}/a.jsonl,", tokenizer)
    with pytest.raises(ValueError, match="names a text twice"):
        load(f"{tmp_path}/a.jsonl, {tmp_path}/a.jsonl", tokenizer)
    with pytest.raises(ValueError, match=r"cannot read the data '.*/absent.jsonl'"):
        load(f"{tmp_path}/a.jsonl,{tmp_path}/absent.jsonl", tokenizer)
