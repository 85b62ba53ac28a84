"""Gradients against finite differences and a plain loop; independence of batching; the file; resuming after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES, VOCABULARY, InFloat64, plain_loss, random_samples, save_tiny, tiny_model

from blockspin.energies import gradients
from blockspin.energies.gradients import Gradients, estimate_gradients
from blockspin.model.batches import Batch, make_batches
from blockspin.model.blocks import find_stack
from blockspin.model.gates import gated
from blockspin.model.tracing import TracedModel, trace_model


@contextmanager
def scaled_branches(model: torch.nn.Module, family: str, alphas: torch.Tensor) -> Iterator[None]:
    """The reference: forward hooks that multiply the named branch modules of layer i by alphas[i]."""

    def scale(i: int) -> Callable[[torch.nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return (output[0] * alphas[i], *output[1:]) if isinstance(output, tuple) else output * alphas[i]

        return hook

    layers = find_stack(model).layers
    handles = [
        layer.get_submodule(name).register_forward_hook(scale(i))
        for i, layer in enumerate(layers)
        for name in FAMILIES[family][1]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_equal_to_a_central_finite_difference(family: str) -> None:
    model, samples = tiny_model(family).double(), random_samples()
    with InFloat64():
        matrix = estimate_gradients(model, samples, progress=False).matrix
    step = 1e-5
    for i in range(4):
        losses = []
        for sign in (1, -1):
            alphas = torch.ones(4, dtype=torch.float64)
            alphas[i] += sign * step
            with scaled_branches(model, family, alphas), torch.no_grad(), InFloat64():
                losses.append([plain_loss(model, sample).item() for sample in samples])
        difference = (np.array(losses[0]) - np.array(losses[1])) / (2 * step)
        np.testing.assert_allclose(matrix[:, i], difference, rtol=1e-5, atol=1e-8)


def test_equal_to_a_loop_over_samples_with_an_explicit_alpha(family: str) -> None:
    model, samples = tiny_model(family).double(), random_samples()
    with InFloat64():
        result = estimate_gradients(model, samples, batch_size=3, progress=False)
    for s, sample in enumerate(samples):
        alphas = torch.ones(4, dtype=torch.float64, requires_grad=True)
        with scaled_branches(model, family, alphas), InFloat64():
            loss = plain_loss(model, sample)
        (gradient,) = torch.autograd.grad(loss, alphas)
        np.testing.assert_allclose(result.matrix[s], gradient.numpy(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(result.losses[s], loss.item(), rtol=1e-6)
    matrix = result.matrix.astype(np.float64)
    np.testing.assert_allclose(result.hessian, sum(np.outer(row, row) for row in matrix) / len(samples))
    np.testing.assert_allclose(result.mean_gradient, sum(matrix) / len(samples))


def test_gates_of_any_value_scale_the_branches_and_get_their_gradients(family: str) -> None:
    model, sample = tiny_model(family).double(), random_samples((9,))[0]
    traced = trace_model(model)
    results = []
    for through_gates in (True, False):
        alphas = torch.tensor([1.0, 0.3, 0.0, 1.7], dtype=torch.float64, requires_grad=True)
        scaled = gated(traced, alphas[None]) if through_gates else scaled_branches(model, family, alphas)
        with scaled, InFloat64():
            loss = plain_loss(model, sample)
        results.append((loss, torch.autograd.grad(loss, alphas)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_independent_of_batch_size_order_and_padding(family: str, checkpointing: bool) -> None:
    model, samples = tiny_model(family), random_samples((3, 17, 9, 9, 2, 12))
    one_by_one = estimate_gradients(model, samples, batch_size=1, progress=False).matrix
    together = estimate_gradients(
        model, samples[::-1], batch_size=4, gradient_checkpointing=checkpointing, progress=False
    ).matrix
    np.testing.assert_allclose(together[::-1], one_by_one, rtol=2e-4, atol=2e-6)


def test_a_sample_that_should_not_fit_is_taken_with_checkpointing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before memory runs out, and only that sample; the result is the same to the last bit."""
    model, samples = tiny_model("llama"), random_samples((40, 8, 24, 40))
    expected = estimate_gradients(model, samples, batch_size=1, progress=False)
    assert "checkpointing" not in capsys.readouterr().err

    # Half of the free memory holds what four blocks keep of 32 tokens (`tokens_that_fit`), and their logits.
    free = 2 * 32 * (4 * 4 * 4 * (32 + 48) + 4 * 4 * VOCABULARY)
    monkeypatch.setattr("blockspin.model.largest_batch.free_memory", lambda device: free)
    taken = []
    run = gradients.gate_gradients

    def seen(traced: TracedModel, batch: Batch, checkpointing: bool, label_seed: int | None) -> Any:
        taken.append((batch.token_ids.numel(), checkpointing))
        return run(traced, batch, checkpointing, label_seed)

    monkeypatch.setattr(gradients, "gate_gradients", seen)
    found = estimate_gradients(model, samples, batch_size=1, progress=False)
    assert taken == [(40, True), (40, True), (24, False), (8, False)]
    np.testing.assert_array_equal(found.matrix, expected.matrix)
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert "sample of 40 tokens; 2 of this length or longer" in capsys.readouterr().err.replace("\n", " ")

    estimate_gradients(model, samples, batch_size=1, gradient_checkpointing=True, progress=False)
    assert "Note" not in capsys.readouterr().err  # it was asked for


def test_sums_over_a_narrow_dtype_are_made_in_float32() -> None:
    """In bfloat16 the result keeps more digits than bfloat16 has, so it was not summed or stored in it."""
    model, samples = tiny_model("llama"), random_samples((40, 40))
    exact = estimate_gradients(model, samples, progress=False).matrix
    narrow = estimate_gradients(model.bfloat16(), samples, progress=False).matrix
    assert narrow.dtype == np.float32
    assert np.abs(narrow - exact).max() < 0.1 * np.abs(exact).max()
    assert not np.array_equal(torch.from_numpy(narrow).bfloat16().float().numpy(), narrow)


def test_works_on_a_model_spread_by_device_map(tmp_path: Path) -> None:
    """Blocks whose weights accelerate keeps on disk and moves in for each pass give the same gradients."""
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "model", vocabulary=64)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    spread = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread |= {f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(4)}
    parts = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=spread, offload_folder=tmp_path / "offload"
    )
    samples = random_samples()
    expected = estimate_gradients(whole, samples, progress=False).matrix
    np.testing.assert_allclose(estimate_gradients(parts, samples, progress=False).matrix, expected, rtol=1e-5)


def test_unusable_input_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no samples"):
        estimate_gradients(model, [])
    with pytest.raises(ValueError, match=r"sample 1 .* at least two tokens"):
        estimate_gradients(model, [torch.tensor([1, 2]), torch.tensor([3])])
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"loss of sample .* is nan"):
        estimate_gradients(model, random_samples(), progress=False)


def test_file_keeps_everything(tmp_path: Path) -> None:
    result = estimate_gradients(tiny_model("llama"), random_samples(), metadata={"model": "tiny"}, progress=False)
    result.save(tmp_path / "gradients.safetensors")
    loaded = Gradients.load(tmp_path / "gradients.safetensors")
    assert (loaded.blocks, loaded.metadata) == (result.blocks, result.metadata)
    np.testing.assert_array_equal(loaded.matrix, result.matrix)
    np.testing.assert_array_equal(loaded.losses, result.losses)


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gradients.safetensors"
    with pytest.raises(ValueError, match="no gradients file"):
        Gradients.load(path)
    estimate_gradients(tiny_model("llama"), random_samples(), progress=False).save(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            Gradients.load(path)


def test_a_partial_file_of_another_model_is_refused(tmp_path: Path) -> None:
    partial, samples = tmp_path / "partial.jsonl", random_samples()
    estimate_gradients(tiny_model("llama"), samples, partial=partial, progress=False)
    with pytest.raises(ValueError, match="another model, other samples"):
        estimate_gradients(tiny_model("llama", seed=5), samples, partial=partial, progress=False)
    with pytest.raises(ValueError, match="another model, other samples"):
        estimate_gradients(tiny_model("llama"), samples[1:], partial=partial, progress=False)


_SLOW_RUN = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from conftest import random_samples, tiny_model
from blockspin.energies import gradients
plain = gradients.gate_gradients
def counted(model, batch, *rest):
    with open({log!r}, "a") as log:
        log.write(" ".join(map(str, batch.indices)) + "\\n")
    time.sleep(0.2)
    return plain(model, batch, *rest)
gradients.gate_gradients = counted
samples = random_samples((9, 5, 12, 2, 7, 8, 6, 11, 10, 4))
gradients.estimate_gradients(
    tiny_model("llama"), samples, batch_size=2, partial={partial!r}, progress=False
).save({out!r})
"""


def test_a_killed_run_continues_and_computes_no_finished_batch_again(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / name) for name in ("log", "partial", "out")}
    code = _SLOW_RUN.format(tests=str(Path(__file__).parents[1]), **paths)
    first = subprocess.Popen([sys.executable, "-c", code])
    partial = Path(paths["partial"])
    while not (partial.exists() and partial.read_text().count("\n") >= 3):  # the header and two batches
        assert first.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not Path(paths["out"]).exists()
    finished = [tuple(json.loads(line)["indices"]) for line in partial.read_text().splitlines()[1:]]
    with partial.open("a") as file:
        file.write('{"indices": [0, 1], "ro')  # what a kill in the middle of a write leaves
    before = Path(paths["log"]).read_text().splitlines()
    subprocess.run([sys.executable, "-c", code], check=True)
    again = Path(paths["log"]).read_text().splitlines()[len(before) :]
    assert len(finished) >= 2
    assert not {" ".join(map(str, indices)) for indices in finished} & set(again)
    samples = random_samples((9, 5, 12, 2, 7, 8, 6, 11, 10, 4))
    assert len(finished) + len(again) == len(make_batches(samples, 2))
    unbroken = estimate_gradients(tiny_model("llama"), samples, batch_size=2, progress=False)
    np.testing.assert_array_equal(Gradients.load(paths["out"]).matrix, unbroken.matrix)
