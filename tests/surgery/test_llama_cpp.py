"""What is pruned converts to GGUF and runs in llama.cpp. Needs a folder of llama.cpp with convert_hf_to_gguf.py.

LLAMA_CPP=.../llama.cpp pytest -m slow tests/surgery/test_llama_cpp.py      # pip install '.[llama-cpp]'
"""

from __future__ import annotations

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

from blockspin.surgery.checkpoint import prune_checkpoint

VOCABULARY = 512
SCRIPTS = Path(__file__).parents[2] / "scripts"
# Removals that leave llama and qwen3 alike in all layers; those of Gemma break the period of their window.
CASES = {"llama": (0, 3), "qwen3": (1, 2), "gemma2": (0,), "gemma3_text": (1,)}

pytestmark = pytest.mark.slow


@pytest.fixture
def converter() -> Path:
    path = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"
    if "LLAMA_CPP" not in os.environ or not path.is_file():
        pytest.skip("LLAMA_CPP is not set to a folder with convert_hf_to_gguf.py")
    pytest.importorskip("gguf")
    return path


def pruned(model_type: str, removed: tuple[int, ...], folder: Path) -> tf.PreTrainedModel:
    """Save a small model with a tokenizer that the converter knows, prune it on disk and load it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    # llama.cpp scales attention by the width of a head, as the released models of this family do
    changes = {"query_pre_attn_scalar": 8} if model_type.startswith("gemma") else {}
    model = tiny_random_model(tiny_config(model_type, vocab_size=VOCABULARY, **changes))
    model.save_pretrained(folder / "whole")
    text = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "whole" / "tokenizer"),
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    prune_checkpoint(folder / "whole", removed, folder / "short", progress=False)
    return tf.AutoModelForCausalLM.from_pretrained(folder / "short", dtype="float32").eval()


def converted(converter: Path, folder: Path) -> Path:
    target = folder / "short.gguf"
    command: list[str | Path] = [sys.executable, converter, folder / "short", "--outtype", "f32", "--outfile", target]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return target


def answer(path: Path, prompt: list[int]) -> tuple[np.ndarray, list[int]]:
    """llama.cpp's log-probabilities after the prompt (vocabulary,), and what it generates greedily."""
    llama = pytest.importorskip("xllamacpp")
    parameters = llama.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.port, parameters.verbosity = 128, 1, 0, 0
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    request: dict[str, Any] = {"prompt": prompt, "n_predict": 8, "temperature": 0, "n_probs": VOCABULARY}
    result = llama.Server(parameters).handle_completions({**request, "ignore_eos": True})
    steps = result["choices"][0]["logprobs"]["content"]
    logprobs = np.full(VOCABULARY, np.nan)
    for entry in steps[0]["top_logprobs"]:
        logprobs[entry["id"]] = entry["logprob"]
    return logprobs, [step["id"] for step in steps]


@pytest.mark.parametrize("model_type", CASES)
def test_the_converted_file_holds_the_pruned_model(converter: Path, model_type: str, tmp_path: Path) -> None:
    import gguf

    model = pruned(model_type, CASES[model_type], tmp_path)
    reader = gguf.GGUFReader(converted(converter, tmp_path))
    layers = model.model.layers
    architecture = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{architecture}.block_count"].contents() == len(layers)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert {int(name.split(".")[1]) for name in found if name.startswith("blk.")} == set(range(len(layers)))
    for i, layer in enumerate(layers):
        np.testing.assert_array_equal(found[f"blk.{i}.ffn_down.weight"], layer.mlp.down_proj.weight.detach().numpy())
        np.testing.assert_array_equal(found[f"blk.{i}.attn_v.weight"], layer.self_attn.v_proj.weight.detach().numpy())


@pytest.mark.parametrize("model_type", CASES)
def test_llama_cpp_computes_what_transformers_computes(converter: Path, model_type: str, tmp_path: Path) -> None:
    """On a prompt longer than the sliding window, so that it matters which layers have one."""
    model = pruned(model_type, CASES[model_type], tmp_path)
    path = converted(converter, tmp_path)
    if model_type.startswith("gemma"):
        complete = tmp_path / "complete.gguf"
        command: list[str | Path] = [sys.executable, SCRIPTS / "complete_gguf.py", tmp_path / "short", path, complete]
        subprocess.run(command, check=True, capture_output=True)
        path = complete
    prompt = torch.randint(5, 400, (1, 24), generator=torch.Generator().manual_seed(0))
    logprobs, tokens = answer(path, prompt[0].tolist())
    with torch.no_grad():
        expected = model(prompt, use_cache=False).logits[0, -1].log_softmax(-1)
    np.testing.assert_allclose(logprobs, expected.numpy(), rtol=0, atol=2e-3)
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
    assert tokens == generated[0, 24:].tolist()
