"""Removals measured together give what each gives alone, for every family, order, limit and fallback."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import plain_loss, random_samples, tiny_model

from blockspin.model import quality as measures
from blockspin.model.batches import make_batches
from blockspin.model.losses import mean_loss
from blockspin.model.passes import shared_passes
from blockspin.model.quality import Reference, kl, measured, quality_of, shared_losses, shared_qualities
from blockspin.model.tracing import TracedModel, skipped, trace_model
from blockspin.surgery.memory import remove_blocks

EVERY = [removal for m in range(4) for removal in combinations(range(4), m)]


def test_shared_passes_equal_plain_ones(family: str) -> None:
    """Every removal of a four-block model, in a shuffled order and with one repeated."""
    model, batch = tiny_model(family), make_batches(random_samples((9, 6)), 2)[0]
    traced = trace_model(model)
    assert traced.shares_passes
    removals = [*EVERY[::-1], EVERY[5]]
    with torch.no_grad():
        found = dict(shared_passes(traced, batch, removals))
        assert sorted(found) == list(range(len(removals)))
        for k, removed in enumerate(removals):
            with skipped(traced, removed):
                expected = batch.forward(model)
            logits = traced.halves.logits(found[k].flatten(0, 1))
            torch.testing.assert_close(logits, expected.flatten(0, 1))
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("states", [0, 1, 2])
def test_a_memory_limit_changes_nothing_but_the_time(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = tiny_model("llama"), random_samples((9, 9))
    limit = states * 2 * 9 * 32 * 4  # bytes of the hidden states of the one batch
    expected = [mean_loss(remove_blocks(model, removed), samples) for removed in EVERY]
    for module in ("passes", "quality"):
        monkeypatch.setattr(f"blockspin.model.{module}.states_limit", lambda device: limit)
    assert shared_losses(trace_model(model), EVERY, samples) == pytest.approx(expected, rel=1e-5)


def count_block_runs(
    monkeypatch: pytest.MonkeyPatch, model: tf.PreTrainedModel, removals: list[tuple[int, ...]]
) -> int:
    runs: list[int] = []

    def counted(run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            runs.append(1)
            return run(hidden)

        return forward

    for layer in model.model.layers:
        monkeypatch.setattr(layer.mlp, "forward", counted(layer.mlp.forward))
    traced = trace_model(model)
    assert traced.shares_passes
    runs.clear()
    with torch.no_grad():
        list(shared_passes(traced, make_batches(random_samples((5,)), 1)[0], removals))
    return len(runs)


def test_common_prefixes_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many block runs as the tree of prefixes has edges of kept blocks, and one more where a pass has no block to
    run: what remains of a removal that branches off before the last block and takes it."""
    edges = {(tuple(i in r for i in range(d)), d) for r in EVERY for d in range(4) if d not in r}
    assert count_block_runs(monkeypatch, tiny_model("llama"), EVERY) <= len(edges) + sum(3 in r for r in EVERY)
    assert len(edges) < sum(4 - len(r) for r in EVERY) / 1.5


def test_padding_and_batch_size_make_no_difference() -> None:
    model, samples = tiny_model("llama"), random_samples()
    one = shared_losses(trace_model(model), EVERY, samples, batch_size=1)
    assert shared_losses(trace_model(model), EVERY, samples, batch_size=5) == pytest.approx(one, rel=1e-5)


def test_a_model_whose_blocks_see_more_than_the_hidden_states_gets_whole_passes() -> None:
    """Here block 3 adds what entered block 0, kept aside: a pass that starts in the middle would miss it."""
    model = tiny_model("llama")
    kept: list[torch.Tensor] = []
    first, last = model.model.layers[0], model.model.layers[3]
    run_first, run_last = first.forward, last.forward
    model.register_forward_pre_hook(lambda module, args: kept.clear())

    def keep_and_run(hidden: torch.Tensor, **kwargs: object) -> object:
        kept.append(hidden)
        return run_first(hidden, **kwargs)

    first.forward = keep_and_run
    last.forward = lambda h, **kwargs: run_last(h, **kwargs) + sum(kept)
    assert not trace_model(model).shares_passes


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_how_many_tokens_a_measure_sees_at_a_time_makes_no_difference(size: int) -> None:
    traced, samples = trace_model(tiny_model("llama")), random_samples()
    expected = measured(traced, EVERY, samples, measures.quality)
    traced.halves.cached = size
    np.testing.assert_allclose(measured(traced, EVERY, samples, measures.quality), expected, rtol=1e-5, atol=1e-7)


def test_divergences_are_as_precise_as_float32_allows_over_a_large_vocabulary() -> None:
    """Inner products that sum in order are off by 5e-5 here."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(8, 128_000, generator=generator).mul_(3).log_softmax(-1)
    q = (p + 0.5 * torch.randn(p.shape, generator=generator)).log_softmax(-1)
    exact = (p.double().exp() * (p.double() - q.double())).sum(-1)
    found = kl(q, Reference(torch.zeros(8, dtype=torch.int64), lambda: p))[:, 0]
    np.testing.assert_allclose(found.numpy(), exact.numpy(), atol=1e-5)


def test_qualities_are_those_of_the_definition() -> None:
    model, samples = tiny_model("gemma2"), random_samples()
    found = shared_qualities(trace_model(model), EVERY, samples, batch_size=2)
    for removed, quality in zip(EVERY, found, strict=True):
        smaller, divergence, agreeing, loss, tokens = remove_blocks(model, removed), 0.0, 0, 0.0, 0
        with torch.no_grad():
            for sample in samples:
                p, q = (m(sample[None], use_cache=False).logits[0, :-1].softmax(-1) for m in (model, smaller))
                divergence += float((p * (p / q).log()).sum())
                agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
                loss += float(plain_loss(smaller, sample)) * (len(sample) - 1)
                tokens += len(sample) - 1
        assert quality.kl == pytest.approx(divergence / tokens, rel=1e-3, abs=1e-5)
        assert quality.agreement == pytest.approx(agreeing / tokens)
        assert quality.loss == pytest.approx(loss / tokens, rel=1e-5)
        whole = quality_of(smaller, model, samples, batch_size=3)
        assert (whole.loss, whole.kl) == pytest.approx((quality.loss, quality.kl), rel=1e-4, abs=1e-5)


def test_the_fallback_measures_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = tiny_model("llama"), random_samples()
    shared = shared_qualities(trace_model(model), EVERY, samples)
    monkeypatch.setattr(TracedModel, "shares_passes", False)
    for a, b in zip(shared, shared_qualities(trace_model(model), EVERY, samples), strict=True):
        assert (a.loss, a.kl, a.agreement) == pytest.approx((b.loss, b.kl, b.agreement), rel=1e-5, abs=1e-6)
