"""Batches count tokens, and one that does not fit into memory is halved: results are those of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, random_samples, tiny_model

from blockspin import baselines
from blockspin.baselines.scores import measure_activations
from blockspin.energies import estimate_energies
from blockspin.energies.fitted import fit_removals
from blockspin.energies.gradients import estimate_gradients
from blockspin.energies.removals import gauss_newton
from blockspin.evaluation.perplexity import tokens_per_second
from blockspin.memory import OutOfMemory
from blockspin.model.batches import BUSY_CPU, Room, make_batches, token_mean
from blockspin.model.losses import losses_of
from blockspin.model.quality import quality_of
from blockspin.problem import RemovalProblem
from blockspin.selection.select import run_selection
from blockspin.solvers.candidates import Candidate
from blockspin.surgery.memory import remove_blocks

SAMPLES = random_samples((9, 9, 5, 12, 2, 7, 3, 4))
FITTING = 16  # tokens that fit into a little memory
PROBLEM = RemovalProblem(np.eye(4), 1)


@contextmanager
def little_memory(model: tf.PreTrainedModel) -> Iterator[list[int]]:
    """A block runs out of memory on batches of more than `FITTING` tokens; yields the tokens of all that it saw."""
    seen: list[int] = []

    def hook(layer: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].shape[0] * args[0].shape[1])
        if seen[-1] > FITTING:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = model.model.layers[2].register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def test_batches_hold_as_many_tokens_as_so_many_of_the_longest_samples() -> None:
    batches = make_batches(SAMPLES, 2)
    assert sorted(index for batch in batches for index in batch.indices) == list(range(len(SAMPLES)))
    assert all(batch.token_ids.numel() <= 24 for batch in batches)
    assert [batch.lengths.tolist() for batch in batches] == [[12, 9], [9, 7], [5, 4, 3, 2]]
    for batch in batches:
        for index, row in zip(batch.indices, batch.token_ids, strict=True):
            assert torch.equal(row[: len(SAMPLES[index])], SAMPLES[index])
            assert not row[len(SAMPLES[index]) :].any()


def test_auto_takes_what_keeps_the_processor_busy() -> None:
    samples = [torch.ones(128, dtype=torch.int64)] * 100
    assert len(make_batches(samples, "auto")[0].indices) == BUSY_CPU // 128
    assert len(make_batches([torch.ones(2 * BUSY_CPU, dtype=torch.int64)] * 3, "auto")) == 3


Samples = Sequence[torch.Tensor]
MEASURES: dict[str, Callable[[tf.PreTrainedModel, Samples], Any]] = {
    "secant": lambda model, samples: gauss_newton(model, samples, progress=False).matrices,
    "gates moved": lambda model, samples: gauss_newton(model, samples, step=0.5, progress=False).matrices,
    "pairwise": lambda model, samples: estimate_energies("pairwise", model, samples, progress=False).hessian,
    "gradients": lambda model, samples: estimate_gradients(model, samples, progress=False).matrix,
    "fitted": lambda model, samples: fit_removals(model, samples, passes=80, progress=False).divergence,
    "losses": lambda model, samples: losses_of(model, samples).numpy(),
    "quality": lambda model, samples: quality_of(remove_blocks(model, [1]), model, samples).kl,
    "activations": lambda model, samples: measure_activations(model, samples).angle,
    "weights": lambda model, samples: baselines.weight_importance(model, samples),
    "merging": lambda model, samples: baselines.sliding_window_merging(model, samples, PROBLEM).threshold,
    "selection": lambda model, samples: selected(model, samples),
}


def selected(model: tf.PreTrainedModel, samples: Samples) -> list[float]:
    """The objective of each single removal."""
    pool = [Candidate((block,), "", 0.0) for block in range(4)]
    selection = run_selection(model, pool, samples, problem=PROBLEM, budget=8, progress=False)
    return [trial.loss for trial in sorted(selection.trials, key=lambda trial: trial.removed)]


@pytest.mark.parametrize("name", MEASURES)
def test_what_does_not_fit_is_halved_and_gives_the_same(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama")
    expected = MEASURES[name](model, SAMPLES)
    assert "memory" not in capsys.readouterr().err
    with little_memory(model) as seen:
        found = MEASURES[name](model, SAMPLES)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < sum(tokens > FITTING for tokens in seen) < 5  # what fitted is remembered
    said = capsys.readouterr().err
    assert "Out of memory with" in said
    assert "at a time from here on" in said
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MEASURES.keys() - {"merging"})
def test_what_should_not_fit_is_not_tried(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Free memory of which half is what `FITTING` tokens take with their logits, in one block or kept of all four."""
    kept = 4 if name == "gradients" else 1
    free = 2 * FITTING * (kept * 4 * 4 * (32 + 48) + 4 * 4 * VOCABULARY)

    model = tiny_model("llama")
    expected = MEASURES[name](model, SAMPLES)
    monkeypatch.setattr("blockspin.model.largest_batch.free_memory", lambda device: free)
    model = tiny_model("llama")  # one that was not seen with more
    with little_memory(model) as seen:
        found = MEASURES[name](model, SAMPLES)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert FITTING / 2 < max(seen) <= FITTING
    assert "memory" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["secant", "gradients", "fitted", "losses", "activations", "weights", "selection"])
def test_a_sample_that_does_not_fit_ends_with_a_remedy(name: str) -> None:
    model = tiny_model("llama")
    remedy = rf"{FITTING + 4} tokens.*--max-length.*--dtype bfloat16"
    with little_memory(model), pytest.raises(OutOfMemory, match=remedy):
        MEASURES[name](model, random_samples((FITTING + 4, FITTING + 4)))


def test_where_a_single_sample_does_not_fit_gradients_are_checkpointed(capsys: pytest.CaptureFixture[str]) -> None:
    """As if what the blocks keep for the backward pass did not fit, and their inputs did."""
    model = tiny_model("llama")
    expected = estimate_gradients(model, SAMPLES, progress=False).matrix
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += 1
        if saved > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tensor

    def restart(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal saved
        saved = 0

    handle = model.model.register_forward_pre_hook(restart, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        found = estimate_gradients(model, SAMPLES, progress=False).matrix
    handle.remove()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert "gradient checkpointing from here on" in capsys.readouterr().err


def test_speed_is_measured_on_what_fits() -> None:
    model = tiny_model("llama")
    with little_memory(model):
        assert tokens_per_second([model], SAMPLES, rounds=2, progress=False)[0] > 0


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def run(batch: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        list(Room(math.inf).results(make_batches(SAMPLES, 8), run))

    def out_of_host_memory(batch: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(OutOfMemory):
        list(Room(math.inf).results(make_batches(SAMPLES, 8), out_of_host_memory))


def test_a_mean_over_tokens_is_that_of_all_predicted_tokens_in_a_row() -> None:
    """The first token of each sample is not predicted."""
    generator = np.random.default_rng(0)
    per_token = [generator.normal(size=(3, len(sample) - 1)) for sample in SAMPLES]
    of_samples = np.stack([values.mean(axis=1) for values in per_token], axis=1)  # (3, samples)
    np.testing.assert_allclose(token_mean(of_samples, SAMPLES), np.concatenate(per_token, axis=1).mean(axis=1))
