"""A dozen unlike architectures by default, all of them in the slow test; what is special in some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tf
from conftest import save_tokenizer, settings
from examination import REMOVALS, cache_agrees, examine, quiet_examine
from safetensors.torch import load_file
from tiny import COMPOSITE_TYPES, MODEL_TYPES, tiny_config, tiny_random_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from blockspin.model.blocks import find_blocks
from blockspin.model.loading import load_model
from blockspin.model.losses import mean_loss
from blockspin.model.tracing import skipped, trace_model
from blockspin.pipeline.compress import compress
from blockspin.problem import Removal
from blockspin.surgery.checkpoint import prune_checkpoint
from blockspin.surgery.feasible import Removable
from blockspin.surgery.memory import remove_blocks
from blockspin.surgery.shards import layer_prefix

# model type -> (the kinds of its blocks, removals that must work, removals that must be refused)
UNLIKE: dict[str, tuple[list[str], list[Removal], list[Removal]]] = {
    "bloom": (["attention+mlp"] * 6, [(0, 2, 5)], []),  # adds the residual inside its sub-modules
    "opt": (["attention+mlp"] * 6, [(1, 4)], []),
    "gpt_oss": (["attention+moe"] * 6, [(0, 2, 5)], []),
    "deepseek_v3": (["attention+mlp"] + ["attention+moe"] * 5, [(0,), (2, 3)], []),  # first_k_dense_replace
    "jamba": (["mamba+mlp", "attention+moe"] * 3, [(0,), (2, 3)], [(2,)]),  # periods
    "bamba": (
        ["mamba+mlp", "attention+mlp", "mamba+mlp", "mamba+mlp", "attention+mlp", "mamba+mlp"],
        [(0, 2)],  # a list of layer indices
        [(1, 4)],  # all the attention there is
    ),
    "gemma3n_text": (["attention+mlp"] * 6, [(0,), (5,)], [(2,)]),  # shared keys and values, a slice for each layer
    "minicpm3": (["attention+mlp"] * 6, [(1, 4)], []),  # residuals scaled by the depth
    "nemotron_h": (["mamba", "moe", "attention", "mamba", "moe", "mlp"], [(1, 4), (0,)], [(2,)]),
    "qwen3_next": (
        ["linear_attention+moe"] * 3 + ["attention+moe"] + ["linear_attention+moe"] * 2,
        [(0, 5)],
        [(3,)],
    ),
    "recurrent_gemma": (["recurrent+mlp", "recurrent+mlp", "attention+mlp"] * 2, [(0, 1, 2), (1,)], []),
    "zamba": (["mamba", "attention+mamba+mlp"] * 3, [(1,)], []),  # shared blocks, the first of them removed
    "zamba2": (["mamba", "attention+mamba+mlp"] * 3, [(1, 3), (5,), (1, 2, 3)], [(1,)]),  # two shared blocks in turn
    "llava": (["attention+mlp"] * 6, [(0, 2, 5)], []),  # an image encoder as deep, its list called alike
    "qwen2_5_vl": (["attention+mlp"] * 6, [(2, 3)], []),  # the checkpoint names its layers otherwise than the model
    "qwen3_vl": (["attention+mlp"] * 6, [(2, 3)], [(0,)]),  # adds features of images after the first two blocks
    "mllama": (["attention+mlp"] * 3 + ["cross_attention+mlp"] + ["attention+mlp"] * 2, [(0, 2, 5)], [(3,)]),
    "zaya": (["attention+moe+mlp"] * 6, [(5,)], [(2,)]),  # routers that use the router before
    "reformer": (["attention+mlp"] * 6, [], [(0,), (5,)]),  # two residual streams
    "qwen4_exp_text": (  # a list of layers that counts from 1
        [
            *("linear_attention+moe", "linear_attention+conv+moe+mlp", "linear_attention+moe", "attention+moe"),
            *("linear_attention+conv+moe+mlp", "linear_attention+moe"),
        ],
        [(2, 5), (4,)],
        [(1,)],
    ),
}


@pytest.mark.parametrize("model_type", UNLIKE)
def test_unlike_architectures(model_type: str) -> None:
    kinds, works, refused = UNLIKE[model_type]
    row = examine(model_type, (*works, *refused))
    assert row.kinds == kinds
    assert not row.faults
    assert row.works == works
    assert list(row.refused) == refused


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *COMPOSITE_TYPES])
def test_every_architecture(model_type: str) -> None:
    """Passes, is refused as a whole, or is refused removal by removal; nothing in between."""
    row = quiet_examine(model_type)
    assert not row.faults
    if not row.cannot_start and not row.not_a_decoder:
        assert len(row.works) + len(row.refused) == len(REMOVALS)


def can_be_shortened(model: tf.PreTrainedModel, folder: Path, removed: tuple[int, int]) -> bool:
    """Whether this removal is possible in memory and on disk."""
    try:
        remove_blocks(model, removed)
        prune_checkpoint(folder / "model", removed, folder / f"without {removed}", progress=False)
    except ValueError:
        return False
    return True


@pytest.mark.timeout(0)
@pytest.mark.parametrize(
    "model_type",
    ["gemma3n_text", *(pytest.param(t, marks=pytest.mark.slow) for t in [*MODEL_TYPES, *COMPOSITE_TYPES])],
)
def test_a_whole_run(model_type: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compress` ends with a checkpoint that loads, wherever the model itself can be built, saved and loaded."""
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        monkeypatch.setitem(tiny._SMALL, name, 300)
    try:
        model = tiny_random_model(tiny_config(model_type))
        trace_model(model)
        mean_loss(model, [torch.arange(2, 12), torch.arange(2, 6)])  # padded: some types of transformers fail on it
        model.save_pretrained(tmp_path / "model")
        load_model(tmp_path / "model")
    except Exception as error:
        pytest.skip(f"see docs/architectures.md ({error})")
    if not any(can_be_shortened(model, tmp_path, removed) for removed in ((4, 5), (0, 1), (2, 3))):
        pytest.skip("see docs/architectures.md")
    save_tokenizer(tmp_path / "model")
    numbers = {"energy": "fitted", "energy_samples": 8, "selection_samples": 4, "evaluation_samples": 4}
    compress(settings(tmp_path / "model", text_file, budget=2.0, **numbers), tmp_path / "run")
    loaded = load_model(tmp_path / "run" / "checkpoint")
    assert len(find_blocks(loaded)) == len(find_blocks(model)) - 2


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_encoders_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match="not causal"):
        trace_model(tiny_random_model(tiny_config(model_type)))


@pytest.mark.parametrize("model_type", ["bart", "whisper"])
def test_parts_of_encoder_decoders_are_refused(model_type: str) -> None:
    with pytest.raises(ValueError, match="part of an encoder-decoder"):
        find_blocks(tiny_random_model(tiny_config(model_type)))


def test_layers_spread_over_several_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="spread over the lists"):
        find_blocks(tiny_random_model(tiny_config("xlm")))


def test_an_image_encoder_as_deep_as_the_decoder_is_not_taken_for_it() -> None:
    config = tiny_config("git")
    assert config.vision_config.num_hidden_layers == config.num_hidden_layers
    model = tiny_random_model(config)
    assert sum(block.num_parameters for block in find_blocks(model)) == sum(
        p.numel() for p in model.git.encoder.layer.parameters()
    )


def test_the_image_encoder_of_a_shortened_model_stays_as_it_is(tmp_path: Path) -> None:
    """Byte for byte on disk; with an image the shortened models from disk and in memory do what skipping does."""
    model = tiny_random_model(tiny_config("llava", image_token_index=5))
    model.save_pretrained(tmp_path / "whole")
    prune_checkpoint(tmp_path / "whole", [1, 4], tmp_path / "short", progress=False)
    whole, short = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "short"))
    removed = {name for name in whole if "language_model.model.layers.4." in name or ".layers.5." in name}
    others = {name: tensor for name, tensor in whole.items() if "language_model" not in name}
    assert sum(".layers.5." in name for name in others) > 0
    assert short.keys() == whole.keys() - {name for name in removed if "language_model" in name}
    torch.testing.assert_close({name: short[name] for name in others}, others, rtol=0, atol=0)
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.tensor([[2, 5, 5, 5, 5, 3, 4]]), "use_cache": False}
    with torch.no_grad():
        found = load_model(tmp_path / "short")(**inputs, pixel_values=image).logits
        in_memory = remove_blocks(model, [1, 4])(**inputs, pixel_values=image).logits
        with skipped(trace_model(model), [1, 4]):
            by_skipping = model(**inputs, pixel_values=image).logits
            without_image = model(**inputs).logits
    torch.testing.assert_close(found, in_memory)
    torch.testing.assert_close(found, by_skipping)
    assert not torch.allclose(found, without_image, atol=1e-2)


def test_settings_of_the_image_encoder_are_not_taken_for_the_decoders(tmp_path: Path) -> None:
    """Old folders have the decoder's settings at the top, beside those of the image encoder, which lists layers too."""
    model = tiny_random_model(tiny_config("qwen2_5_vl"))
    model.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole" / "config.json"
    written = json.loads(path.read_text())
    written |= {name: value for name, value in written.pop("text_config").items() if name not in written}
    path.write_text(json.dumps(written))
    assert written["vision_config"]["fullatt_block_indexes"] == [1, 4]
    prune_checkpoint(tmp_path / "whole", [0, 2], tmp_path / "short", progress=False)
    short = json.loads((tmp_path / "short" / "config.json").read_text())
    expected = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    assert short == written | {name: value for name, value in expected.items() if name in written}


def test_the_tensors_inside_tell_lists_of_the_same_name_apart() -> None:
    inside = {f"{i}.{name}": (4, 4) for i in range(2) for name in ("q.weight", "up.weight")}
    text = {f"language_model.model.layers.{name}": shape for name, shape in inside.items()}
    vision = {f"vision_tower.layers.{i}.{name}": (4, 2) for i in range(2) for name in ("q.weight", "up.weight")}
    assert layer_prefix(vision | text, "model.language_model.layers", 2, inside) == "language_model.model.layers"
    with pytest.raises(ValueError, match="may be any of"):
        layer_prefix(text | {f"vision_tower.layers.{n}": s for n, s in inside.items()}, "decoder.layers", 2, inside)


def test_features_of_images_added_at_named_blocks_are_not_moved() -> None:
    """Granite 4 Vision names the blocks that they are added before: blocks behind the last of them can go."""
    model = tiny_random_model(tiny_config("granite4_vision"))
    with pytest.raises(ValueError, match=r"among the first 4 blocks .* without the blocks \[3\]"):
        remove_blocks(model, [3])

    stream = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))  # (samples, tokens, width)
    seen = torch.tensor([[False, True, True, False, False]])[..., None]  # where the image is
    features = {i: torch.full((2, 32), float(i + 1)) for i in range(4)}  # before each block: (tokens, width)
    found = []
    for decoder in (model.model.language_model, remove_blocks(model, [4]).model.language_model):
        with torch.no_grad():
            found.append(decoder(inputs_embeds=stream, vision_mask=seen, deepstack_features=features)[0])
    with torch.no_grad(), skipped(trace_model(model), [4]):
        by_skipping = model.model.language_model(inputs_embeds=stream, vision_mask=seen, deepstack_features=features)[0]
    torch.testing.assert_close(found[1], by_skipping)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_a_cache_that_counts_in_the_first_layer_needs_attention_there(tmp_path: Path) -> None:
    """MiniMax's own: without block 0 it would count no tokens, and the positions of what is generated be wrong."""
    model = tiny_random_model(tiny_config("minimax"))
    with pytest.raises(ValueError, match=r"MiniMaxCache counts tokens in the first block.*\[0, 2, 4\]"):
        remove_blocks(model, [0])
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="MiniMaxCache"):
        prune_checkpoint(tmp_path / "whole", [0], tmp_path / "short")
    assert not (tmp_path / "short").exists()
    assert not Removable(model.config)([0])
    assert cache_agrees(remove_blocks(model, [0, 1]), torch.arange(2, 14)[None])


def test_what_is_decoded_with_the_cache_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surgery finds the fault of MiniMax's cache by decoding, too."""
    monkeypatch.setattr("blockspin.surgery.proof.attention_obstacle", lambda model, kept: None)
    with pytest.raises(ValueError, match="computes something else with its cache"):
        remove_blocks(tiny_random_model(tiny_config("minimax")), [0])


def test_a_model_that_shares_blocks_is_saved_after_removal(tmp_path: Path) -> None:
    """Zamba2's names of shared weights are those of the layers that are left."""
    model = tiny_random_model(tiny_config("zamba2"))
    smaller = remove_blocks(model, [1, 3])
    smaller.save_pretrained(tmp_path)
    again, report = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again.state_dict(), smaller.state_dict(), rtol=0, atol=0)


def test_hidden_states_changed_between_blocks_are_refused() -> None:
    """RWKV halves the stream after every so many blocks, and scales the weights of the blocks to match."""
    model = tiny_random_model(tiny_config("rwkv", rescale_every=2))
    with pytest.raises(ValueError, match=r"changes the hidden states between its blocks 1 and 2.*load it with 0"):
        remove_blocks(model, [2])


def test_hidden_states_are_not_changed_between_blocks_where_that_is_a_setting(tmp_path: Path) -> None:
    """RWKV as blockspin loads it computes what transformers computes, and so does it without some blocks."""
    tiny_random_model(tiny_config("rwkv", rescale_every=2)).save_pretrained(tmp_path / "whole")
    prune_checkpoint(tmp_path / "whole", [2, 5], tmp_path / "short", progress=False)
    ids = torch.arange(2, 14)[None]
    model = load_model(tmp_path / "whole")
    for ours, folder in ((model, "whole"), (remove_blocks(model, [2, 5]), "short")):
        theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert theirs.config.rescale_every == 2
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)


class LayersWithNumbers(tf.LlamaForCausalLM):  # type: ignore[misc]
    """Its layers hold a value that depends on their position and that no checkpoint holds."""

    def __init__(self, config: tf.LlamaConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.register_buffer("slope", torch.tensor(0.5**i), persistent=False)

    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaDecoderLayer) and hasattr(module, "slope"):
            module.slope.fill_(0.5**module.self_attn.layer_idx)


def test_computed_values_that_depend_on_the_position_are_compared() -> None:
    """They would come out otherwise when the shortened checkpoint is loaded."""
    model = LayersWithNumbers(tiny_config("llama"))
    remove_blocks(model, [5])
    with pytest.raises(ValueError, match=r"block 4 would become a different layer 3 \(the values of slope\)"):
        remove_blocks(model, [3])


def test_skipping_passes_on_what_the_next_block_takes() -> None:
    """In HY-V4 a block may take the choice of tokens that an earlier one has made, handed on from block to block."""
    model = tiny_random_model(tiny_config("hy_v4"))
    ids = torch.arange(2, 14)[None]
    with torch.no_grad(), skipped(trace_model(model), [2]):
        by_skipping = model(ids, use_cache=False).logits
    with torch.no_grad():
        torch.testing.assert_close(by_skipping, remove_blocks(model, [2])(ids, use_cache=False).logits)
