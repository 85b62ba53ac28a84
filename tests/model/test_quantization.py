"""4-bit loading on a CPU, with and without the packed kernels of AVX512-BF16, against the dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf

from blockspin.model.loading import load_model, model_without_weights
from blockspin.model.quantization import layers_that_cannot_be_packed, nf4

bitsandbytes = pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit, modules  # noqa: E402

PACKS = bool(modules.has_avx512bf16())
# The output of the feed-forward layer has 96 inputs, no multiple of 64; every other layer can be packed.
WIDTHS = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not PACKS, reason="needs AVX512-BF16"))])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bitsandbytes packs the weights: as it does here, or as on a processor without AVX512-BF16."""
    if not request.param:
        monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    return bool(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**WIDTHS, vocab_size=300, num_hidden_layers=2, initializer_range=0.2)
    tf.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_only_what_can_be_held_is_quantised_and_the_rest_is_named(
    folder: Path, packs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = tf.LlamaForCausalLM.from_pretrained(folder)
    settings = nf4(model_without_weights(exact.config), torch.device("cpu"), torch.float32)
    loaded = load_model(folder, dtype="float32", quantization=settings)

    kept = {name for name, layer in loaded.named_modules() if type(layer) is torch.nn.Linear}
    expected = {"lm_head"} | ({f"model.layers.{i}.mlp.down_proj" for i in range(2)} if packs else set())
    assert kept == expected
    assert ("2 x model.layers.*.mlp.down_proj" in capsys.readouterr().err) == packs

    # The reference multiplies by the weights that the 4 bits stand for; packed layers multiply in bfloat16.
    with torch.no_grad():
        for name, layer in exact.named_modules():
            if type(layer) is torch.nn.Linear and name not in kept:
                layer.weight.copy_(dequantize_4bit(*quantize_4bit(layer.weight.data, quant_type="nf4")))

        token_ids = torch.arange(12)[None]
        reference, found = exact(token_ids).logits, loaded(token_ids).logits
    error = float((found - reference).norm() / reference.norm())
    assert error < (0.03 if packs else 1e-5)
    assert any(
        getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == packs for layer in quantised(loaded)
    )


def quantised(model: torch.nn.Module) -> list[Linear4bit]:
    return [layer for layer in model.modules() if isinstance(layer, Linear4bit)]


@pytest.mark.skipif(not PACKS, reason="needs AVX512-BF16")
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (64, 48), (96, 64), (32, 32), (576, 1536), (128, 1)])
def test_layers_that_cannot_be_packed_are_those_that_fail(inputs: int, outputs: int) -> None:
    linear = torch.nn.Linear(inputs, outputs, bias=False)
    layer = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4").eval()
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer = layer.to("cpu")

    try:
        with torch.no_grad():
            layer(torch.ones(3, inputs))
        runs = True
    except (RuntimeError, AssertionError):
        runs = False
    assert runs == (not layers_that_cannot_be_packed(torch.nn.Sequential(linear)))
