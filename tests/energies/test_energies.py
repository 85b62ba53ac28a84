"""Energies from shortened models: their definitions, files, resuming, errors and bootstrap, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import plain_loss, random_samples, tiny_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from blockspin.config import ENERGY_NAMES
from blockspin.energies import estimate_energies, load_energies
from blockspin.energies.gradients import Gradients, estimate_gradients
from blockspin.energies.removals import Interactions, gauss_newton, measure_pairs
from blockspin.energies.robustness import robustness
from blockspin.journal import Journal
from blockspin.model.batches import Batch, frozen, make_batches
from blockspin.model.blocks import find_blocks
from blockspin.model.gates import gated
from blockspin.model.tracing import trace_model
from blockspin.problem import Block, RemovalProblem
from blockspin.surgery.memory import remove_blocks

SAMPLES = random_samples((9, 5, 12, 7))


def objective(model: tf.PreTrainedModel, removed: tuple[int, ...], kind: str) -> float:
    """The loss, or the KL divergence from the whole model, of a model built without some blocks: token mean."""
    smaller, total = remove_blocks(model, removed) if removed else model, 0.0
    with torch.no_grad():
        for sample in SAMPLES:
            if kind == "loss":
                total += float(plain_loss(smaller, sample)) * (len(sample) - 1)
            else:
                p, q = (m(sample[None], use_cache=False).logits[0, :-1].log_softmax(-1) for m in (model, smaller))
                total += float((p.exp() * (p - q)).sum())
    return total / sum(len(sample) - 1 for sample in SAMPLES)


@pytest.mark.parametrize("kind", ["kl", "loss"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pairs_give_single_and_double_removals_exactly(family: str, kind: Literal["kl", "loss"]) -> None:
    model = tiny_model(family)
    found = measure_pairs(model, SAMPLES, objective=kind, batch_size=3, progress=False)
    problem = RemovalProblem(found.hessian, 2, blocks=found.blocks)
    whole = objective(model, (), kind)
    for removed in [*((i,) for i in range(4)), *combinations(range(4), 2)]:
        assert problem.energy(removed) == pytest.approx(objective(model, removed, kind) - whole, abs=1e-5, rel=1e-4)


def test_the_secant_form_is_the_covariance_of_changes_of_the_logits() -> None:
    model = tiny_model("llama")
    found = gauss_newton(model, SAMPLES, batch_size=3, progress=False).hessian
    expected, tokens = np.zeros((4, 4)), 0
    with torch.no_grad():
        for sample in SAMPLES:
            whole = model(sample[None], use_cache=False).logits[0, :-1].double()
            z = [remove_blocks(model, [i])(sample[None], use_cache=False).logits[0, :-1] - whole for i in range(4)]
            for t, p in enumerate(whole.softmax(-1).numpy()):
                expected += np.cov([change[t].numpy() for change in z], aweights=p, bias=True) / 2
                tokens += 1
    np.testing.assert_allclose(found, expected / tokens, rtol=2e-4)


def test_a_small_step_gives_the_derivative() -> None:
    """Against the Jacobian of the logits with respect to the gates, by automatic differentiation."""
    model = tiny_model("qwen3")
    found = gauss_newton(model, SAMPLES, step=0.01, progress=False).hessian
    traced, expected, tokens = trace_model(model), np.zeros((4, 4)), 0
    for sample in SAMPLES:
        batch = make_batches([sample], 1)[0]

        def logits(alphas: torch.Tensor, batch: Batch = batch) -> torch.Tensor:
            with gated(traced, alphas[None]):
                return batch.forward(model)[0, :-1]

        with frozen(model):
            j = torch.autograd.functional.jacobian(logits, torch.ones(4))  # type: ignore[no-untyped-call]
            p = logits(torch.ones(4)).softmax(-1)
        centred = j - (p[..., None] * j).sum(1, keepdim=True)
        expected += torch.einsum("tv,tvi,tvj->ij", p, centred, centred).detach().numpy() / 2
        tokens += len(sample) - 1
    np.testing.assert_allclose(found, expected / tokens, rtol=0.03, atol=0.01 * np.abs(expected).max() / tokens)


def test_in_16_bits_the_step_is_larger_than_what_is_rounded_away() -> None:
    model = tiny_model("qwen3")
    expected = gauss_newton(model, SAMPLES, step=0.01, progress=False).hessian
    found = gauss_newton(model.to(torch.bfloat16), SAMPLES, step=0.05, progress=False).hessian
    assert np.linalg.norm(found - expected) < 0.15 * np.linalg.norm(expected)


def test_gradients_with_the_models_labels_estimate_the_gauss_newton_form() -> None:
    """For a sample of T predicted tokens E[a a^T] = 1/T of the mean Fisher matrix of a token, twice the form."""
    model, sample = tiny_model("llama"), SAMPLES[2]
    many = [
        estimate_gradients(model, [sample] * 50, labels="model", seed=seed, batch_size=50, progress=False).matrix
        for seed in range(30)
    ]
    drawn = np.concatenate(many).astype(np.float64)
    expected = 2 * gauss_newton(model, [sample], step=0.01, progress=False).hessian / (len(sample) - 1)
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), expected, atol=0.15 * np.abs(expected).max())
    text = estimate_gradients(model, [sample], progress=False).matrix
    assert not np.allclose(many[0][0], text[0])


@pytest.mark.parametrize("energy", ENERGY_NAMES)
def test_batches_and_padding_make_no_difference(energy: str) -> None:
    model = tiny_model("llama")
    together, alone = (
        estimate_energies(energy, model, SAMPLES, batch_size=size, progress=False).hessian for size in (4, 1)
    )
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=2e-4 * np.abs(alone).max())


def test_an_unknown_name_is_told_the_names() -> None:
    with pytest.raises(ValueError, match=f"choose one of {', '.join(ENERGY_NAMES)} .--energy"):
        estimate_energies("magic", tiny_model("llama"), SAMPLES)


@pytest.mark.parametrize("energy", ENERGY_NAMES)
def test_files_give_back_what_was_saved(energy: str, tmp_path: Path) -> None:
    found = estimate_energies(energy, tiny_model("llama"), SAMPLES, metadata={"model": "tiny"}, progress=False)
    found.save(tmp_path / "e.safetensors")
    loaded = load_energies(tmp_path / "e.safetensors")
    assert type(loaded) is type(found)
    np.testing.assert_array_equal(loaded.hessian, found.hessian)
    assert loaded.blocks == found.blocks
    assert loaded.metadata == {"model": "tiny", "energy": energy}
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_energies(tmp_path / "other")
    with pytest.raises(ValueError, match="no energies file"):
        load_energies(tmp_path / "absent")


@pytest.mark.parametrize("measure", [measure_pairs, gauss_newton])
def test_an_interrupted_measurement_continues(
    measure: Callable[..., Interactions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny_model("llama"), tmp_path / "partial.jsonl"
    whole = measure(model, SAMPLES, batch_size=1, progress=False)
    append = Journal.append
    done: list[list[int]] = []

    def noting(self: Journal, entry: Mapping[str, Any]) -> None:
        append(self, entry)
        done.append(entry["indices"])

    def stopping(self: Journal, entry: Mapping[str, Any]) -> None:
        noting(self, entry)
        if len(done) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(model, SAMPLES, batch_size=1, partial=path, progress=False)
    monkeypatch.setattr(Journal, "append", noting)
    again = measure(model, SAMPLES, batch_size=1, partial=path, progress=False)
    assert len(done) == len(SAMPLES)
    np.testing.assert_array_equal(again.matrices, whole.matrices)
    with pytest.raises(ValueError, match="other settings"):
        measure(model, SAMPLES[:3], partial=path, progress=False)


def test_later_samples_measure_only_pairs_of_low_states() -> None:
    """Ten blocks of which the first is dear: no pair with it is in a low state, so it is measured on few samples."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=10, num_attention_heads=4, intermediate_size=48
    )
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            if parameter.ndim == 2:
                parameter.mul_(30)
    found = measure_pairs(model, random_samples((8,) * 12), progress=False)
    measured = ~np.isnan(found.matrices)
    assert measured[:4].all()
    assert measured[:, range(10), range(10)].all()
    assert not measured[4:, 0, 1:].any()
    lowest = set(np.argsort(np.diag(found.hessian))[:3].tolist())
    assert all(measured[4:, i, j].all() for i, j in combinations(sorted(lowest), 2))
    assert np.isfinite(found.hessian).all()
    assert (found.standard_errors[0, 1:] > 0).all()


def test_standard_errors_are_those_of_a_mean() -> None:
    generator = np.random.default_rng(0)
    half = generator.normal(size=(40, 3, 3))
    matrices = (half + half.swapaxes(1, 2)).astype(np.float32)
    matrices[20:, 0, 2] = matrices[20:, 2, 0] = np.nan
    found = Interactions(matrices, np.full(40, 7), tuple(Block(i, "a", 1) for i in range(3)))
    assert found.standard_errors[0, 1] == pytest.approx(matrices[:, 0, 1].std(ddof=1) / np.sqrt(40), rel=1e-5)
    assert found.standard_errors[0, 2] == pytest.approx(matrices[:20, 0, 2].std(ddof=1) / np.sqrt(20), rel=1e-5)
    assert found.hessian[0, 2] == pytest.approx(matrices[:20, 0, 2].mean(), rel=1e-5)


def test_steps_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="step=0"):
        gauss_newton(tiny_model("llama"), SAMPLES, step=0)


def test_equal_samples_are_perfectly_robust_and_opposite_ones_are_not() -> None:
    blocks = tuple(Block(i, "a", 1) for i in range(4))
    same = Gradients(np.tile(np.array([1.0, 2, 3, 4], np.float32), (20, 1)), blocks, np.ones(20, np.float32))
    found = robustness(same, RemovalProblem(same.hessian, 2, blocks=blocks))
    assert (found.same, found.shared) == (1.0, 1.0)
    assert found.order == pytest.approx(1.0)
    assert found.frequency.tolist() == [1, 1, 0, 0]
    assert "more samples" not in found.summary()
    split = Gradients(np.array([[0, 1], [1, 0]] * 10, np.float32), blocks[:2], np.ones(20, np.float32))
    found = robustness(split, RemovalProblem(split.hessian, 1, blocks=blocks[:2]), replicates=200)
    # Block 0 is the ground state when fewer of its samples are drawn: half of the time, ties aside.
    assert 0.3 < found.frequency[0] < 0.7
    assert "more samples" in found.summary()


def test_kinds_of_blocks_are_those_of_the_model() -> None:
    model = tiny_model("llama")
    assert list(gauss_newton(model, SAMPLES[:1], progress=False).blocks) == find_blocks(model)


def test_a_file_of_another_kind_of_energies_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "e.safetensors", tiny_model("llama")
    gauss_newton(model, SAMPLES[:1], progress=False).save(path)
    assert isinstance(Interactions.load(path), Interactions)
    with pytest.raises(ValueError, match="not a file of gradients"):
        Gradients.load(path)
    save_file({"matrix": np.zeros(3)}, path)
    for load in (load_energies, Gradients.load):
        with pytest.raises(ValueError, match="not a file of"):
            load(path)


def test_only_gradients_have_a_first_order_term() -> None:
    model = tiny_model("llama")
    assert gauss_newton(model, SAMPLES[:1], progress=False).mean_gradient is None
    assert estimate_gradients(model, SAMPLES[:1], progress=False).mean_gradient is not None


def test_a_file_whose_numbers_cannot_be_is_refused(tmp_path: Path) -> None:
    """What a hand or a fault may have changed: counts, shapes, types and the header."""
    model, path = tiny_model("llama"), tmp_path / "e.safetensors"
    gauss_newton(model, SAMPLES, progress=False).save(path)
    arrays = load_file(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["blockspin"])
    matrices, tokens = arrays["matrices"], arrays["tokens"]

    def written(header: object, **changes: np.ndarray) -> Path:
        save_file({**arrays, **changes}, path, metadata={"blockspin": json.dumps(header)})
        return path

    assert load_energies(written(header)).blocks == tuple(find_blocks(model))
    for changes, message in (
        ({"tokens": -tokens}, "tokens holds -"),
        ({"tokens": 0 * tokens}, "tokens holds 0"),
        ({"tokens": tokens[:0], "matrices": matrices[:0]}, "no samples"),
        ({"tokens": tokens[:2]}, "different number"),
        ({"tokens": np.array(3)}, "no samples"),
        ({"matrices": matrices[:, :3, :3]}, "shape"),
        ({"matrices": matrices[:, 0]}, "shape"),
        ({"matrices": matrices > 0}, "holds bool"),
        ({"extra": tokens}, "is not a file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_energies(written(header, **changes))
    odd: list[dict[str, object]] = [
        {"blocks": header["blocks"][::-1]},
        {"blocks": [{**block, "num_parameters": -1} for block in header["blocks"]]},
        {"blocks": [{**block, "kind": 3} for block in header["blocks"]]},
        {"blocks": 5},
        {"kind": []},
        {"kind": "gradients"},
        {"metadata": None},
    ]
    for change in odd:
        with pytest.raises(ValueError, match="is not a file of energies"):
            load_energies(written({**header, **change}))
    for header in ([], 5, None, {}):
        with pytest.raises(ValueError, match="is not a file of energies"):
            load_energies(written(header))
