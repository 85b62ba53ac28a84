"""Loading in 4 bits, with and without the packed kernels of AVX512-BF16, and in 8, against what the bits stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import random_samples

from blockspin.baselines import sliding_window_merging, weight_importance
from blockspin.energies import estimate_energies
from blockspin.energies.removals import NARROW_STEP, gauss_newton
from blockspin.model import fingerprint
from blockspin.model.blocks import count_parameters, find_blocks
from blockspin.model.loading import load_model
from blockspin.model.losses import losses_of
from blockspin.problem import RemovalProblem

bitsandbytes = pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Linear8bitLt, modules  # noqa: E402

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


def test_in_8_bits_rows_of_weights_and_tokens_are_rounded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact, loaded = load_model(folder), load_model(folder, quantization="int8")
    assert sum(isinstance(layer, Linear8bitLt) for layer in loaded.modules()) == 4 * 7
    assert type(loaded.lm_head) is torch.nn.Linear

    def to_8_bits(rows: torch.Tensor) -> torch.Tensor:
        narrow = rows.half().float()  # as bitsandbytes takes them
        step = narrow.abs().amax(1, keepdim=True) / 127
        return (narrow / step).round() * step

    name = "model.layers.1.mlp.up_proj"
    entering = torch.randn(20, WIDTHS["hidden_size"])
    with torch.no_grad():
        expected = to_8_bits(entering) @ to_8_bits(exact.get_submodule(name).weight).T
        found = loaded.get_submodule(name)(entering)
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    assert capsys.readouterr().err == ""


def test_in_8_bits_a_sample_gives_the_same_in_any_batch(folder: Path) -> None:
    """Also where activations are large, which LLM.int8() finds over a whole batch."""
    model = load_model(folder, quantization="int8")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(8)
    samples = random_samples((12, 7, 12, 9))
    alone, together = (losses_of(model, samples, batch_size) for batch_size in (1, 4))
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_blocks_have_as_many_parameters_as_before(folder: Path, quantization: str) -> None:
    exact, loaded = load_model(folder), load_model(folder, quantization=quantization)
    assert count_parameters(loaded) == count_parameters(exact) == exact.num_parameters()
    assert find_blocks(loaded) == find_blocks(exact)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_results_are_told_from_those_of_the_model_as_it_is(folder: Path, quantization: str) -> None:
    loaded, samples = load_model(folder, quantization=quantization), random_samples()
    before = fingerprint.of_results(loaded, samples)
    with torch.no_grad():
        loaded(samples[0][None])
    assert before == fingerprint.of_results(loaded, samples)
    assert before == fingerprint.of_results(load_model(folder, quantization=quantization), samples)
    assert before != fingerprint.of_results(load_model(folder), samples)


@pytest.mark.parametrize("energy", ["fitted", "secant", "fisher"])
def test_energies_are_those_of_the_rounded_weights(energy: str, folder: Path) -> None:
    models = [rounded(folder), load_model(folder, quantization="nf4"), load_model(folder)]
    samples = random_samples((12, 7, 12, 9))
    reference, found, exact = (estimate_energies(energy, model, samples, progress=False).hessian for model in models)
    scale = abs(reference).max()
    assert abs(found - reference).max() < 1e-4 * scale
    assert abs(found - exact).max() > 1e-2 * scale


@pytest.mark.parametrize("energy", ["fitted", "secant", "empirical-fisher"])
def test_energies_in_8_bits_are_near_those_of_the_weights_as_they_are(energy: str, folder: Path) -> None:
    samples = random_samples((12, 7, 12, 9))
    models = [load_model(folder, quantization="int8"), load_model(folder, quantization="nf4"), load_model(folder)]
    in_8, in_4, exact = (estimate_energies(energy, model, samples, progress=False).hessian for model in models)
    assert 0 < abs(in_8 - exact).max() < abs(in_4 - exact).max() / 2


def test_gates_move_further_than_8_bits_round(folder: Path) -> None:
    samples = random_samples((12, 7, 12, 9))
    found = estimate_energies("gauss-newton", load_model(folder, quantization="int8"), samples, progress=False).hessian
    expected = gauss_newton(load_model(folder), samples, step=NARROW_STEP, progress=False).hessian
    assert abs(found - expected).max() < 0.1 * abs(expected).max()


def test_methods_that_use_the_weights_themselves_refuse(folder: Path) -> None:
    model, samples = load_model(folder, quantization="nf4"), random_samples()
    problem = RemovalProblem(torch.eye(4).numpy(), 1, blocks=find_blocks(model))
    with pytest.raises(ValueError, match=r"sliding-window merging needs the true weights.*leave out --quantization"):
        sliding_window_merging(model, samples, problem)
    with pytest.raises(ValueError, match="gradient of weights needs the true weights"):
        weight_importance(model, samples)
