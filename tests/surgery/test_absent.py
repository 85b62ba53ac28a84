"""Sub-layers taken out of a model: it computes, generates and is saved like any other."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import FAMILIES, random_samples, tiny_model
from tiny import tiny_config, tiny_random_model

import blockspin as bs
from blockspin import baselines
from blockspin.model.batches import make_batches
from blockspin.model.gates import gated
from blockspin.model.losses import sample_losses
from blockspin.model.tracing import closed, trace_model
from blockspin.problem import Removal

BATCH = make_batches(random_samples((9, 9)), 2)[0]
TWO_BRANCHES = [family for family in FAMILIES if family != "gpt_neox"]
REMOVALS: list[Removal] = [(0,), (2, 3, 5), (0, 1, 2, 5)]  # an attention; a block and an MLP; a block and some of both


def generated(model: tf.PreTrainedModel, use_cache: bool) -> torch.Tensor:
    prompt = torch.tensor([[5, 9, 11]])
    tokens: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False, use_cache=use_cache
    )
    return tokens


@pytest.mark.parametrize("family", TWO_BRANCHES)
@pytest.mark.parametrize("removed", REMOVALS)
def test_an_ordinary_model_is_left(family: str, removed: Removal, tmp_path: Path) -> None:
    model = tiny_model(family)
    smaller = bs.remove_blocks(model, removed, units="sublayers")
    with torch.no_grad(), closed(trace_model(model, "sublayers"), removed):
        expected = BATCH.forward(model)
    with torch.no_grad():
        torch.testing.assert_close(BATCH.forward(smaller), expected)
    assert torch.equal(generated(smaller, use_cache=True), generated(smaller, use_cache=False))

    # Saved and loaded again it is the same, with no weight made up.
    smaller.save_pretrained(tmp_path)
    loaded, report = tf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert loaded.num_parameters() == smaller.num_parameters() < model.num_parameters()
    with torch.no_grad():
        assert torch.equal(BATCH.forward(loaded), BATCH.forward(smaller))
    assert torch.equal(generated(loaded, use_cache=True), generated(smaller, use_cache=True))


def test_a_removal_of_whole_blocks_is_that_of_blocks(tmp_path: Path) -> None:
    model = tiny_model("llama")
    smaller = bs.remove_blocks(model, (2, 3, 6, 7), units="sublayers")
    assert type(smaller) is type(model)
    blocks = bs.remove_blocks(model, (1, 3))
    assert smaller.config.to_dict() == blocks.config.to_dict()
    with torch.no_grad():
        assert torch.equal(BATCH.forward(smaller), BATCH.forward(blocks))


def test_the_cache_holds_nothing_of_what_is_gone() -> None:
    smaller = bs.remove_blocks(tiny_model("llama"), (0, 4), units="sublayers")
    with torch.no_grad():
        cache = smaller(input_ids=BATCH.token_ids, use_cache=True).past_key_values
    filled = [layer.keys is not None and layer.keys.numel() > 0 for layer in cache.layers]
    assert sum(filled) == 2
    assert cache.get_seq_length() == 9


def test_nothing_takes_a_saved_model_for_a_whole_one(tmp_path: Path) -> None:
    """Without the code of its own it does not load: the stock class would make up the weights that are gone."""
    bs.remove_blocks(tiny_model("qwen3"), (2,), units="sublayers").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)


def test_a_saved_model_is_saved_again(tmp_path: Path) -> None:
    bs.remove_blocks(tiny_model("llama"), (1, 4), units="sublayers").save_pretrained(tmp_path / "once")
    once = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "once", trust_remote_code=True)
    once.save_pretrained(tmp_path / "twice")
    twice = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "twice", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(BATCH.forward(twice), BATCH.forward(once))
    assert twice.config.per_layer_config[0].skip == ["mlp"]


# A removal, a second one in numbers of what the first one leaves, and both in those of the original.
SECOND: list[tuple[Removal, Removal, Removal]] = [
    ((3,), (3,), (3, 4)),  # an MLP, then an attention
    ((3,), (0, 3, 4), (0, 3, 4, 5)),  # then an attention and a block
    ((2, 5), (1, 2), (1, 2, 3, 5)),  # then the MLP of a block without attention
]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize(("first", "second", "both"), SECOND)
def test_a_second_removal_is_one_removal_of_both(family: str, first: Removal, second: Removal, both: Removal) -> None:
    model = tiny_model(family)
    once = bs.remove_blocks(model, first, units="sublayers")
    assert len(bs.find_units(once, "sublayers")) == 8 - len(first)
    twice, at_once = (bs.remove_blocks(*pair, units="sublayers") for pair in ((once, second), (model, both)))

    assert type(twice).__name__ == type(at_once).__name__
    assert twice.config.to_dict() == at_once.config.to_dict()
    torch.testing.assert_close(twice.state_dict(), at_once.state_dict(), rtol=0, atol=0)
    with torch.no_grad(), closed(trace_model(model, "sublayers"), both):
        torch.testing.assert_close(BATCH.forward(twice), BATCH.forward(model))
    assert torch.equal(generated(twice, use_cache=True), generated(at_once, use_cache=False))


def test_whole_blocks_go_from_a_model_that_lacks_sublayers() -> None:
    model = tiny_model("llama")
    once = bs.remove_blocks(model, (3,), units="sublayers")
    expected = bs.remove_blocks(model, (3, 4, 5), units="sublayers")
    found = bs.remove_blocks(once, (2,))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert found.config.absent_modules == expected.config.absent_modules

    # Where the block goes that lacks something, nothing is absent any more.
    nothing = bs.remove_blocks(once, (1,))
    with torch.no_grad():
        assert torch.equal(BATCH.forward(nothing), BATCH.forward(bs.remove_blocks(model, (1,))))


def test_units_that_are_left_have_the_gates_and_scores_that_they_have_in_the_original() -> None:
    """Against the original with the gate of what is gone closed."""
    model, left = tiny_model("llama"), [0, 1, 2, 4, 5, 6, 7]
    once, samples = bs.remove_blocks(model, (3,), units="sublayers"), random_samples((9, 7))
    found = bs.estimate_gradients(once, samples, units="sublayers", progress=False).matrix  # (2, 7)

    (batch,), traced = make_batches(samples, 2), trace_model(model, "sublayers")
    alphas = torch.ones(2, 8)
    alphas[:, 3] = 0
    alphas.requires_grad_(True)
    with gated(traced, alphas):
        losses = sample_losses(traced.halves, traced.halves.hidden_of(batch), batch)
    (gradients,) = torch.autograd.grad(losses.sum(), alphas)
    np.testing.assert_allclose(found[list(batch.indices)], gradients[:, left], rtol=1e-3, atol=1e-5)

    scores = baselines.measure_activations(once, samples, units="sublayers").cosine
    expected = baselines.measure_activations(model, samples, units="sublayers", removed=(3,)).cosine
    np.testing.assert_allclose(scores, expected[left], rtol=1e-5)


def test_experts_can_go() -> None:
    model = tiny_random_model(tiny_config("qwen3_moe"))
    experts = [unit.index for unit in bs.find_units(model, "sublayers") if unit.kind == "moe"]
    smaller = bs.remove_blocks(model, experts[1:3], units="sublayers")
    assert torch.equal(generated(smaller, use_cache=True), generated(smaller, use_cache=False))


def test_an_attention_must_stay() -> None:
    with pytest.raises(ValueError, match="leaves no attention"):
        bs.remove_blocks(tiny_model("llama"), (0, 2, 4, 6), units="sublayers")


def test_the_modelling_file_is_short_and_is_the_one_that_runs(tmp_path: Path) -> None:
    smaller = bs.remove_blocks(tiny_model("llama"), (3,), units="sublayers")
    assert isinstance(smaller, tf.LlamaForCausalLM)
    smaller.save_pretrained(tmp_path)
    source = Path(__file__).parents[2] / "src/blockspin/surgery/modeling_sublayers.py"
    assert sys.modules[type(smaller).__module__].__file__ == str(source)
    assert (tmp_path / source.name).read_text() == source.read_text()
    lines = source.read_text().splitlines()
    assert len(lines) < 80
    assert "SPDX-License-Identifier: Apache-2.0" in lines[0]


@pytest.mark.parametrize("removed", [(3,), (4,), (2, 5), (3, 4)])
def test_repair_follows_the_original(removed: Removal) -> None:
    """Also for sub-layers it brings the model closer on text that it was not fitted to."""
    model = tiny_model("llama", scale=2.0)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(2, 64, (32,), generator=generator) for _ in range(48)]
    smaller = bs.remove_blocks(model, removed, units="sublayers")
    report = bs.repair(smaller, model, samples)
    assert report.kl_after < 0.9 * report.kl_before
    first = min(unit // 2 for unit in removed)
    first = min(unit // 2 for unit in removed)
    assert min(step.block for step in report.steps) in (first - 1, first)


def test_repair_of_sublayers_that_are_blocks_is_that_of_blocks() -> None:
    model = tiny_model("llama", scale=2.0)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(2, 64, (32,), generator=generator) for _ in range(48)]
    as_sublayers = bs.remove_blocks(model, (2, 3), units="sublayers")
    as_block = bs.remove_blocks(model, (1,))
    found = bs.repair(as_sublayers, model, samples)
    expected = bs.repair(as_block, model, samples)
    np.testing.assert_allclose(found.kl_after, expected.kl_after, rtol=1e-6)
