"""Sweeps over offloaded weights give bit by bit what the model in memory gives."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import random_samples, tiny_model
from torch import Tensor

from blockspin.baselines.merging import sliding_window_merging
from blockspin.baselines.scores import measure_activations
from blockspin.energies import estimate_energies
from blockspin.energies.fitted import MOST_CHECKS, fit_removals
from blockspin.energies.removals import gauss_newton
from blockspin.evaluation.cost import measure_costs
from blockspin.evaluation.perplexity import evaluate_models, perplexity, results_table
from blockspin.memory import OutOfMemory
from blockspin.model import streaming
from blockspin.model.batches import make_batches
from blockspin.model.blocks import find_blocks, find_stack
from blockspin.model.fingerprint import of_results
from blockspin.model.loading import load_model
from blockspin.model.offload import OffloadedTensor, offloaded_tensors
from blockspin.model.passes import removal_passes
from blockspin.model.placement import resaving_folder
from blockspin.model.spill import spilled_states
from blockspin.model.streaming import BatchInSweep, Job, jobs_of, swept
from blockspin.model.tracing import TracedModel, trace_model
from blockspin.problem import RemovalProblem
from blockspin.selection.select import run_selection
from blockspin.solvers import solve
from blockspin.solvers.candidates import states_as_candidates
from blockspin.surgery.memory import remove_blocks

REMOVALS = [(), (0,), (1,), (1, 2), (0, 3), (2,), (1, 2), (0, 1, 2), (3,)]


def on_disk(model: tf.PreTrainedModel, folder: Path, everything: bool = False) -> tf.PreTrainedModel:
    """The same model with the weights of its blocks on disk, or all of its weights."""
    model.save_pretrained(folder)
    stack = find_stack(model).name
    places = {}
    for name, module in model.named_modules():
        inside_stack = name.startswith(f"{stack}.")
        if not list(module.children()) and not inside_stack:
            places[name] = "disk" if everything else "cpu"
        elif name.rpartition(".")[0] == stack:
            places[name] = "disk"
    found: tf.PreTrainedModel = tf.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", device_map=places, offload_folder=folder / "offload"
    )
    return found.eval()


def outputs(traced: TracedModel, samples: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """(removal, sample) -> what leaves the decoder, its row."""
    found = {}
    for batch, logits in removal_passes(traced, REMOVALS, samples, batch_size=2):
        for k, of_removal in logits:
            for index, row in zip(batch.indices, of_removal, strict=True):
                found[k, index] = row.clone()
    return found


def test_sweep_gives_what_the_model_in_memory_gives(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    streamed = trace_model(on_disk(model, tmp_path))
    assert streamed.is_offloaded
    assert streamed.shares_passes

    samples = random_samples()
    expected, found = outputs(trace_model(model), samples), outputs(streamed, samples)
    assert expected.keys() == found.keys()
    for key, logits in expected.items():
        assert torch.equal(found[key], logits)


def test_sweeps_in_groups_and_through_a_file_give_the_same(tmp_path: Path) -> None:
    """No memory for hidden states: each batch has a sweep of its own, and its states lie in a file."""
    model = tiny_model("llama")
    streamed, samples = trace_model(on_disk(model, tmp_path)), random_samples()
    expected = outputs(trace_model(model), samples)
    for limit in (0, 20_000):
        for batch, logits in swept(streamed, jobs_of(streamed, REMOVALS, make_batches(samples, 2)), limit):
            for k, of_removal in logits:
                for index, row in zip(batch.indices, of_removal, strict=True):
                    assert torch.equal(row, expected[k, index])


def test_weights_are_read_once_for_all_removals_and_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = trace_model(on_disk(tiny_model("llama"), tmp_path))
    assert streamed.shares_passes
    read: list[str] = []
    load = OffloadedTensor.load

    def counting(tensor: OffloadedTensor) -> Tensor:
        read.append(f"{id(tensor.owner)} {tensor.name}")
        return load(tensor)

    monkeypatch.setattr(OffloadedTensor, "load", counting)
    outputs(streamed, random_samples())
    assert sorted(read) == sorted(f"{id(tensor.owner)} {tensor.name}" for tensor in offloaded_tensors(streamed.layers))


def test_model_is_offloaded_again_after_a_sweep(tmp_path: Path) -> None:
    streamed = trace_model(on_disk(tiny_model("llama"), tmp_path))
    before = dict(streamed.model.named_parameters())
    outputs(streamed, random_samples())
    assert all(before[name] is parameter for name, parameter in streamed.model.named_parameters())
    assert {p.device.type for p in streamed.layers.parameters()} == {"meta"}


def test_model_that_is_on_disk_as_a_whole(tmp_path: Path) -> None:
    model = tiny_model("llama")
    streamed = trace_model(on_disk(model, tmp_path, everything=True))
    expected, found = outputs(trace_model(model), random_samples()), outputs(streamed, random_samples())
    for key, logits in expected.items():
        assert torch.equal(found[key], logits)


@pytest.mark.parametrize("energy", ["secant", "pairwise", "fitted"])
def test_energies_are_those_of_the_model_in_memory(energy: str, tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), random_samples()
    found = estimate_energies(energy, on_disk(model, tmp_path), samples, batch_size=2, progress=False)
    expected = estimate_energies(energy, model, samples, batch_size=2, progress=False)
    assert np.array_equal(found.hessian, expected.hessian)


def test_selection_is_that_of_the_model_in_memory(tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), random_samples()
    hessian = np.diag([1.0, 3.0, 2.0, 4.0])
    found = []
    for own in (model, on_disk(model, tmp_path)):
        problem = RemovalProblem(hessian, remove=2, blocks=find_blocks(own))
        pool = states_as_candidates(solve(problem, states=6))
        found.append(run_selection(own, pool, samples, problem=problem, budget=8, batch_size=2, progress=False))
    expected, streamed = found
    assert streamed.chosen == expected.chosen
    assert streamed.trials == expected.trials


def test_resumes_with_what_sweeps_before_a_kill_have_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = on_disk(tiny_model("llama"), tmp_path), random_samples()
    expected = gauss_newton(model, samples, batch_size=1, progress=False).hessian

    # Without memory for hidden states every batch is a sweep; the process ends in the third.
    monkeypatch.setattr("blockspin.model.streaming.STATES_SHARE", 0.0)
    with monkeypatch.context() as patches:
        patches.setattr(BatchInSweep, "outputs", interrupted_after(2, BatchInSweep.outputs))
        with pytest.raises(KeyboardInterrupt):
            gauss_newton(model, samples, batch_size=1, partial=tmp_path / "partial.jsonl", progress=False)

    swept_again: list[int] = []
    outputs_of = BatchInSweep.outputs

    def noting(batch: BatchInSweep) -> Iterator[tuple[int, Tensor]]:
        swept_again.extend(batch.batch.indices)
        return outputs_of(batch)

    monkeypatch.setattr(BatchInSweep, "outputs", noting)
    found = gauss_newton(model, samples, batch_size=1, partial=tmp_path / "partial.jsonl", progress=False)
    assert np.allclose(found.hessian, expected, rtol=1e-5)  # the samples that are left are batched anew
    assert len(swept_again) == 3  # of five samples, two batches of one were done


def little_memory(model: tf.PreTrainedModel, tokens: int) -> None:
    """From now on, block 2 runs out of memory on more than so many tokens."""

    def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] * args[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    model.model.layers[2].mlp.register_forward_pre_hook(hook)


@pytest.mark.parametrize("limit", [None, 0])  # of hidden states: in one sweep, or a sweep for each batch
def test_a_sweep_that_does_not_fit_starts_again_with_halves(
    limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, samples = on_disk(tiny_model("llama"), tmp_path), random_samples()
    expected = estimate_energies("secant", model, samples, batch_size=4, progress=False).hessian
    activations = measure_activations(model, samples, batch_size=4)
    assert "Out of memory" not in capsys.readouterr().err

    if limit is not None:
        monkeypatch.setattr("blockspin.model.streaming.STATES_SHARE", limit)
    little_memory(model, 12)  # the longest sample
    found = estimate_energies("secant", model, samples, batch_size=4, progress=False).hessian
    assert "at a time from here on" in capsys.readouterr().err
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert np.allclose(measure_activations(model, samples, batch_size=4).angle, activations.angle, rtol=1e-5)
    assert "Out of memory" not in capsys.readouterr().err  # what fits is remembered

    assert {p.device.type for p in find_stack(model).layers.parameters()} == {"meta"}
    with pytest.raises(OutOfMemory, match=r"one sample of 20 tokens.*--max-length"):
        estimate_energies("secant", model, random_samples((20, 20)), progress=False)


def interrupted_after(
    number: int, run: Callable[[BatchInSweep], Iterator[tuple[int, Tensor]]]
) -> Callable[[BatchInSweep], Iterator[tuple[int, Tensor]]]:
    """The function, which is interrupted once it was called so many times."""
    calls = 0

    def counted(batch: BatchInSweep) -> Iterator[tuple[int, Tensor]]:
        nonlocal calls
        calls += 1
        if calls > number:
            raise KeyboardInterrupt
        return run(batch)

    return counted


def test_spilled_states_are_what_was_kept() -> None:
    """Random additions and removals, against a dictionary; the file uses its space again."""
    generator = random.Random(0)
    expected: dict[int, Tensor] = {}
    with spilled_states(memory_limit=2_000) as states:
        for _ in range(300):
            if expected and generator.random() < 0.5:
                number = generator.choice(list(expected))
                assert torch.equal(states.get(number), expected.pop(number))
                states.drop(number)
            else:
                tensor = torch.randn(4, generator.choice([5, 9]), 3).to(generator.choice([torch.bfloat16, torch.float]))
                expected[states.add(tensor)] = tensor
        for number, tensor in expected.items():
            assert torch.equal(states.get(number), tensor)
        assert states.held <= 2_000
        assert 0 < states.in_file < 100_000  # of more than 150 tensors with 120 to 432 bytes, few at a time


def test_full_disk_is_said_before_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = trace_model(on_disk(tiny_model("llama"), tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(ValueError, match=r"100 B free.*--batch-size.*TMPDIR"):
        next(swept(streamed, jobs_of(streamed, REMOVALS, make_batches(random_samples(), "auto")), memory_limit=0))


def test_experts_are_written_anew_and_deleted_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers joins the experts of a layer; what it made of them has to lie somewhere."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    model = mixture_of_experts()
    model.save_pretrained(tmp_path / "model")

    streamed = load_model(tmp_path / "model", device_map="stream")
    (folder,) = (tmp_path / "temporary").iterdir()
    written = sum(path.stat().st_size for path in folder.iterdir())
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert written > sum(p.nbytes for p in experts)
    expected, found = outputs(trace_model(model), random_samples()), outputs(trace_model(streamed), random_samples())
    for key, logits in expected.items():
        assert torch.equal(found[key], logits)

    # Nothing else refers to the model.
    del streamed
    gc.collect()
    assert not folder.exists()


def test_full_disk_is_said_before_a_model_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture_of_experts().save_pretrained(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(ValueError, match=r"150 kB of weights .* 100 B free.*TMPDIR"):
        load_model(tmp_path, device_map="stream")


def test_folder_of_a_killed_process_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    left, used = tmp_path / f"blockspin-offload-abc-{ended}", tmp_path / f"blockspin-offload-abc-{os.getpid()}"
    left.mkdir()
    used.mkdir()
    assert resaving_folder(0).is_dir()
    assert not left.exists()
    assert used.exists()


def mixture_of_experts() -> tf.PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = tf.MixtralConfig(**shape, num_key_value_heads=2, intermediate_size=24, num_local_experts=4)
    model: tf.PreTrainedModel = tf.AutoModelForCausalLM.from_config(config).eval()
    return model


def test_fingerprint_is_that_of_the_model_in_memory(tmp_path: Path) -> None:
    model = tiny_model("llama")
    streamed = on_disk(model, tmp_path / "same")
    expected = of_results(load_model(tmp_path / "same"), random_samples())
    assert of_results(streamed, random_samples()) == expected

    # One number of a block that is never in memory.
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] += 1
    assert of_results(on_disk(model, tmp_path / "other"), random_samples()) != expected


def test_what_needs_the_weights_is_refused(tmp_path: Path) -> None:
    model, samples = on_disk(tiny_model("llama"), tmp_path), random_samples()
    problem = RemovalProblem(np.eye(4), remove=1, blocks=find_blocks(model))
    with pytest.raises(ValueError, match=r"a shortened model .*blockspin prune.* needs all weights .*--device-map cpu"):
        remove_blocks(model, [1])
    with pytest.raises(ValueError, match=r"sliding-window merging needs all weights .*--device-map cpu"):
        sliding_window_merging(model, samples, problem)
    with pytest.raises(ValueError, match=r"a measurement of speed needs all weights .*--device-map cpu"):
        measure_costs({"model": model}, [1])


def test_perplexity_is_that_of_the_model_in_memory_and_nothing_is_timed(tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), random_samples()
    streamed = on_disk(model, tmp_path)
    assert perplexity(streamed, samples, batch_size=2) == perplexity(model, samples, batch_size=2)

    (in_memory,) = evaluate_models({"model": model}, [1], samples, batch_size=2, progress=False)
    (row,) = evaluate_models({"model": streamed}, [1], samples, batch_size=2, progress=False)
    assert row == replace(in_memory, tokens_per_second=None)
    assert "not timed" in results_table([row]).text(80)


def test_scores_from_hidden_states_are_those_of_the_model_in_memory(tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), random_samples()
    expected = measure_activations(model, samples, removed=[2], batch_size=2)
    found = measure_activations(on_disk(model, tmp_path), samples, removed=[2], batch_size=2)
    assert np.array_equal(found.cosine, expected.cosine)
    assert np.array_equal(found.ratio, expected.ratio)
    assert np.array_equal(found.angle, expected.angle)


def test_fitted_energies_measure_all_random_removals_in_one_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single removals, the first turns of all samples, then a sweep for each second turn and check of the lowest."""
    streamed, samples = on_disk(tiny_model("llama"), tmp_path), random_samples()
    sweeps: list[int] = []
    sweep = streaming._one_sweep

    def counting(traced: TracedModel, jobs: Sequence[Job], *others: Any) -> Any:
        sweeps.append(len(jobs))
        return sweep(traced, jobs, *others)

    monkeypatch.setattr(streaming, "_one_sweep", counting)
    found = fit_removals(streamed, samples, batch_size=2, progress=False)
    used = len(set(found.sample.tolist()))
    assert used > 1
    assert sweeps[1] == used  # a job for each sample
    assert len(sweeps) <= 2 + used + MOST_CHECKS
