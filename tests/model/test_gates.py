"""Gates act on the residual branches of every family, exactly, and leave the model as it was."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers as tf
from conftest import random_samples, tiny_model

from blockspin.energies.gradients import estimate_gradients
from blockspin.model.batches import make_batches
from blockspin.model.blocks import find_blocks
from blockspin.model.branches import followed
from blockspin.model.gates import gated
from blockspin.model.tracing import skipped, trace_model
from blockspin.surgery.memory import remove_blocks


def test_blocks_are_found(family: str) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model)
    outside = sum(p.numel() for n, p in model.named_parameters() if not any(f".{i}." in n for i in range(4)))
    assert [block.index for block in blocks] == [0, 1, 2, 3]
    assert {block.kind for block in blocks} == {"attention+mlp"}
    assert sum(block.num_parameters for block in blocks) + outside == model.num_parameters()


def test_branches_are_told_apart(family: str) -> None:
    """Parallel blocks add attention and mlp to the stream in one addition, all others in two."""
    expected = 1 if family == "gpt_neox" else 2
    assert [trace.branches for trace in trace_model(tiny_model(family)).traces] == [expected] * 4


def test_gates_of_one_change_no_bit(family: str) -> None:
    model, batch = tiny_model(family), make_batches(random_samples(), 5)[0]
    with torch.no_grad():
        before = batch.forward(model)
        with gated(trace_model(model), torch.ones(5, 4)):
            inside = batch.forward(model)
        after = batch.forward(model)
    assert torch.equal(before, inside)
    assert torch.equal(before, after)


@pytest.mark.parametrize("removed", [(0,), (3,), (1, 2), (0, 2, 3)])
def test_gates_of_zero_are_the_shortened_model(family: str, removed: tuple[int, ...]) -> None:
    model, batch = tiny_model(family), make_batches(random_samples((9, 9)), 2)[0]
    alphas = torch.ones(2, 4)
    alphas[:, list(removed)] = 0
    traced = trace_model(model)
    with torch.no_grad():
        with gated(traced, alphas):
            by_gates = batch.forward(model)
        with skipped(traced, removed):
            by_skipping = batch.forward(model)
        by_surgery = batch.forward(remove_blocks(model, removed))
        whole = batch.forward(model)
    torch.testing.assert_close(by_gates, by_surgery)
    torch.testing.assert_close(by_skipping, by_surgery)
    assert not torch.allclose(by_surgery, whole, atol=1e-3)


def test_where_branches_cannot_be_told_apart_the_gate_acts_on_the_block() -> None:
    """OPT reshapes the stream inside its layers, so its additions are not recognised."""
    config = tf.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    batch, traced = make_batches(random_samples((9, 9)), 2)[0], trace_model(model)
    assert [trace.branches for trace in traced.traces] == [0, 0, 0]
    smaller = remove_blocks(model, [1])
    with torch.no_grad():
        whole = batch.forward(model)
        with gated(traced, torch.ones(2, 3)):
            assert torch.equal(batch.forward(model), whole)
        with gated(traced, torch.tensor([[1.0, 0.0, 1.0]] * 2)):
            torch.testing.assert_close(batch.forward(model), batch.forward(smaller))


def test_the_model_is_left_untouched_also_after_an_exception(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).train()
    next(model.parameters()).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def check() -> None:
        assert all(module.training for module in model.modules())
        assert not next(model.parameters()).requires_grad
        assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
        assert all(p.grad is None for p in model.parameters())
        assert not any("forward" in vars(module) for module in model.modules())
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    estimate_gradients(model, random_samples(), progress=False)
    check()
    monkeypatch.setattr("blockspin.energies.gradients.sample_losses", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate_gradients(model, random_samples(), progress=False)
    check()


def test_an_encoder_is_refused() -> None:
    config = tf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(ValueError, match="not causal"):
        trace_model(tf.BertForMaskedLM(config))


def test_what_a_block_did_is_not_kept_for_the_garbage_collector() -> None:
    layer, stream = torch.nn.Linear(8, 8), torch.randn(1, 3, 8)
    gc.collect()
    gc.disable()
    try:
        output, additions = followed(lambda: stream + layer(stream), stream)
        held = weakref.ref(additions[-1])
        del output, additions
        assert held() is None
    finally:
        gc.enable()
