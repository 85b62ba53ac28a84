"""Removals stacked in one batch give what each gives alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import random_samples, tiny_model

from blockspin.model import stacking
from blockspin.model.batches import make_batches
from blockspin.model.stacking import is_worth_stacking, stacked_passes
from blockspin.model.tracing import closed, skipped, trace_model
from blockspin.surgery.memory import remove_blocks

EVERY = [removal for m in range(4) for removal in combinations(range(4), m)]


@pytest.mark.parametrize("tokens", [18, 100, 10_000])  # one removal a pass, five, all
def test_stacked_passes_equal_plain_ones(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every removal of a four-block model, in another order and with one repeated, on a padded batch."""
    monkeypatch.setattr(stacking, "TOKENS", tokens)
    model, batch = tiny_model(family), make_batches(random_samples((9, 6)), 2)[0]
    traced = trace_model(model)
    removals = [*EVERY[::-1], EVERY[5]]
    with torch.no_grad():
        found = dict(stacked_passes(traced, batch, removals))
        assert sorted(found) == list(range(len(removals)))
        for k, removed in enumerate(removals):
            with skipped(traced, removed):
                expected = batch.used(batch.forward(model))  # (tokens, vocabulary)
            logits = traced.halves.logits(batch.used(found[k]))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lacking", [False, True])
def test_stacked_sublayers_equal_plain_ones(family: str, lacking: bool) -> None:
    """Also of a model whose second block has no MLP any more."""
    model = tiny_model(family)
    if lacking:
        if family == "gpt_neox":
            pytest.skip("its blocks are one unit each")
        model = remove_blocks(model, (3,), units="sublayers")
    batch, traced = make_batches(random_samples((9, 6)), 2)[0], trace_model(model, "sublayers")
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(traced.num_units)[: k % traced.num_units].tolist() for k in range(24)]
    removals = [tuple(sorted(removed)) for removed in drawn]
    with torch.no_grad():
        found = dict(stacked_passes(traced, batch, removals))
        for k, removed in enumerate(removals):
            with closed(traced, removed):
                expected = batch.used(batch.forward(model))  # (tokens, vocabulary)
            logits = traced.halves.logits(batch.used(found[k]))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_processors_share_first_blocks_instead() -> None:
    batch = make_batches(random_samples((9, 6)), 2)[0]
    assert not is_worth_stacking(trace_model(tiny_model("llama")), batch)
