"""What is decided once for a model: which blocks can be bypassed, what passes share, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import random_samples, tiny_model
from tiny import tiny_config, tiny_random_model

import blockspin as bs
from blockspin.model.batches import make_batches
from blockspin.model.passes import num_passes, removal_passes
from blockspin.model.quality import shared_losses
from blockspin.model.tracing import TracedModel, closed, skipped, trace_model
from blockspin.problem import Removal

BATCH = make_batches(random_samples((9, 9)), 2)[0]
# model type -> (removals of which other blocks need something, others)
NEEDED: dict[str, tuple[list[Removal], list[Removal]]] = {
    "gemma3n_text": ([(2,), (3,), (0, 2)], [(0,), (0, 1), (2, 3, 4, 5)]),  # 4 and 5 read the keys of 2 and 3
    "hy_v4": ([(0, 1)], [(0,), (1,), (2, 5)]),  # the blocks after 0 and 1 take the tokens that one of them chose
}


def count_runs(model: tf.PreTrainedModel) -> list[int]:
    """A list to which every run of a block's feed-forward adds the number of the block."""
    runs: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, args, output, i=i: runs.append(i))
    return runs


@pytest.mark.parametrize("model_type", NEEDED)
def test_blocks_that_others_need_run_and_leave_the_stream(model_type: str) -> None:
    model = tiny_random_model(tiny_config(model_type))
    traced = trace_model(model)
    runs = count_runs(model)
    assert not traced.has_independent_blocks
    assert not traced.shares_passes
    needed, others = NEEDED[model_type]
    for removed in [*needed, *others]:
        assert traced.can_bypass(removed) == (removed in others)
        with torch.no_grad(), closed(traced, removed):
            expected = BATCH.forward(model)
        runs.clear()
        with torch.no_grad(), skipped(traced, removed):
            torch.testing.assert_close(BATCH.forward(model), expected)
        assert runs == [i for i in range(6) if i not in removed or removed in needed]
        assert num_passes(traced, [removed]) == pytest.approx(len(runs) / 6)


@pytest.mark.parametrize("model_type", ["llama", "gemma3n_text"])
def test_costs_are_what_runs(model_type: str) -> None:
    """Shared or not: as many runs of blocks as are charged, and where passes are shared up to one more a removal."""
    model = tiny_random_model(tiny_config(model_type))
    traced = trace_model(model)
    removals = [(), (0,), (1,), (0, 1), (2,), (2, 5), (4,)]
    charged = num_passes(traced, removals) * 6
    runs = count_runs(model)
    for _, outputs in removal_passes(traced, removals, random_samples((9,))):
        list(outputs)
    assert charged <= len(runs) <= charged + (len(removals) if traced.shares_passes else 0) + 1e-9


@pytest.mark.parametrize("error", [KeyError, TypeError, ValueError])
def test_a_fault_in_a_pass_is_not_taken_for_a_need(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that fails once, on long samples only, fails the measurement; nothing is quietly run in another way."""
    model = tiny_model("llama")
    traced = trace_model(model)
    layer = model.model.layers[2]
    failures: list[int] = []
    run = layer.forward

    def failing_once(hidden: torch.Tensor, **kwargs: object) -> object:
        if hidden.shape[1] > 8 and not failures:
            failures.append(1)
            raise error("too long")
        return run(hidden, **kwargs)

    layer.forward = failing_once
    monkeypatch.setattr(TracedModel, "shares_passes", False)
    with pytest.raises(error, match="too long"):
        shared_losses(traced, [(1,)], random_samples((9,)))


# Where models enter.
USES: list[Callable[[Any], object]] = [
    bs.find_blocks,
    bs.find_units,
    lambda model: bs.perplexity(model, random_samples()),
    lambda model: bs.estimate_energies("secant", model, random_samples(), progress=False),
    lambda model: bs.remove_blocks(model, [1]),
    lambda model: bs.repair(model, tiny_model("llama"), random_samples()),
    lambda model: bs.evaluate(model, ["any"]),
    lambda model: bs.distill(tiny_model("llama"), model, random_samples(), random_samples()),
]


@pytest.mark.parametrize("compiled", ["whole", "in place", "a block in place"])
@pytest.mark.parametrize("use", USES)
def test_a_compiled_model_is_refused_at_once(compiled: str, use: Callable[[Any], object]) -> None:
    """Instead of compiling it again for every set of blocks."""
    model: torch.nn.Module = tiny_model("llama")
    if compiled == "whole":
        model = torch.compile(model)  # type: ignore[assignment]
    elif compiled == "in place":
        model.compile()
    else:
        model.get_submodule("model.layers.2").compile()
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        use(model)


@pytest.mark.parametrize("use", USES)
def test_what_is_no_language_model_is_refused(use: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match=r"Linear is no causal language model .* give what Auto"):
        use(torch.nn.Linear(2, 2))
