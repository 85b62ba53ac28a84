"""4-bit loading, with and without the packed kernels of AVX512-BF16, against the weights that the 4 bits stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import random_samples

from blockspin.baselines import sliding_window_merging, weight_importance
from blockspin.energies import estimate_energies
from blockspin.model import fingerprint
from blockspin.model.blocks import count_parameters, find_blocks
from blockspin.model.loading import load_model
from blockspin.problem import RemovalProblem

bitsandbytes = pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, modules  # noqa: E402

# The output of the feed-forward layer has 96 inputs, no multiple of 64; every other layer can be packed.
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
PACKS = bool(modules.has_avx512bf16())


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not PACKS, reason="needs AVX512-BF16"))])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bitsandbytes would pack the weights: as it does here, or as on a processor without AVX512-BF16."""
    if not request.param:
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    return bool(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**WIDTHS, vocab_size=300, num_hidden_layers=4, initializer_range=0.2)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rounded(folder: Path) -> tf.PreTrainedModel:
    """The model in float32, with the weights that the 4 bits stand for."""
    model = tf.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if type(layer) is torch.nn.Linear and name != "lm_head":
                layer.weight.copy_(dequantize_4bit(*quantize_4bit(layer.weight.data, quant_type="nf4")))
    return model.eval()


def test_all_layers_but_the_head_compute_with_their_rounded_weights(folder: Path, packs: bool) -> None:
    reference, loaded = rounded(folder), load_model(folder, dtype="float32", quantization="nf4")
    kept = {name for name, layer in loaded.named_modules() if type(layer) is torch.nn.Linear}
    assert kept == {"lm_head"}
    assert sum(isinstance(layer, Linear4bit) for layer in loaded.modules()) == 4 * 7

    # Reading the state, as a fingerprint does, changes nothing.
    token_ids = torch.arange(12)[None]
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(loaded(token_ids).logits, reference(token_ids).logits, rtol=1e-5, atol=1e-5)
        loaded.state_dict()


def test_blocks_have_as_many_parameters_as_before(folder: Path) -> None:
    exact, loaded = load_model(folder), load_model(folder, quantization="nf4")
    assert count_parameters(loaded) == count_parameters(exact) == exact.num_parameters()
    assert find_blocks(loaded) == find_blocks(exact)


def test_results_are_told_from_those_of_the_model_as_it_is(folder: Path) -> None:
    loaded, samples = load_model(folder, quantization="nf4"), random_samples()
    before = fingerprint.of_results(loaded, samples)
    with torch.no_grad():
        loaded(samples[0][None])
    assert before == fingerprint.of_results(loaded, samples)
    assert before == fingerprint.of_results(load_model(folder, quantization="nf4"), samples)
    assert before != fingerprint.of_results(load_model(folder), samples)


@pytest.mark.parametrize("energy", ["fitted", "secant", "fisher"])
def test_energies_are_those_of_the_rounded_weights(energy: str, folder: Path) -> None:
    models = [rounded(folder), load_model(folder, quantization="nf4"), load_model(folder)]
    samples = random_samples((12, 7, 12, 9))
    reference, found, exact = (estimate_energies(energy, model, samples, progress=False).hessian for model in models)
    scale = abs(reference).max()
    assert abs(found - reference).max() < 1e-4 * scale
    assert abs(found - exact).max() > 1e-2 * scale


def test_methods_that_use_the_weights_themselves_refuse(folder: Path) -> None:
    model, samples = load_model(folder, quantization="nf4"), random_samples()
    problem = RemovalProblem(torch.eye(4).numpy(), 1, blocks=find_blocks(model))
    with pytest.raises(ValueError, match=r"sliding-window merging needs the true weights.*leave out --quantization"):
        sliding_window_merging(model, samples, problem)
    with pytest.raises(ValueError, match="gradient of weights needs the true weights"):
        weight_importance(model, samples)
