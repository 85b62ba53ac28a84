"""Losses, divergences and the secant's form from chunks of hidden states, against a few lines on the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from conftest import plain_loss, random_samples, tiny_model
from tiny import tiny_config, tiny_random_model
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from blockspin.energies.gradients import gate_gradients
from blockspin.energies.removals import gauss_newton
from blockspin.model import head
from blockspin.model.batches import frozen, make_batches
from blockspin.model.head import split_model
from blockspin.model.losses import losses_of, sample_losses
from blockspin.model.quality import kl, loss, measured, quality
from blockspin.model.tracing import skipped, trace_model

# Capped logits, scaled ones in three ways, tied and transposed weights, hybrids, mixtures of experts, a decoder that
# its model does not name.
TYPES = ("gemma2", "cohere", "granite", "mamba2", "gpt2", "jamba", "bamba", "mixtral", "granitemoe", "llama4_text")
LENGTHS = (9, 5, 12, 2, 7)


@pytest.fixture(params=TYPES)
def model(request: pytest.FixtureRequest) -> tf.PreTrainedModel:
    return tiny_random_model(tiny_config(request.param))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of three tokens at a time: chunks begin and end inside of samples."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 3 * 64 * 4)


def logits_of(model: tf.PreTrainedModel, sample: Tensor) -> Tensor:
    """(length - 1, vocabulary), where a token is predicted."""
    with torch.no_grad():
        logits: Tensor = model(sample[None], use_cache=False).logits[0, :-1]
    return logits


def test_measures_are_those_of_the_whole_logits(model: tf.PreTrainedModel, small_chunks: None) -> None:
    traced, samples, removals = trace_model(model), random_samples(LENGTHS), [(1,), (0, 4), (2, 3)]
    assert traced.halves.is_split
    found = measured(traced, removals, samples, quality, batch_size=2)
    for place, measure in enumerate((loss, kl)):
        alone = measured(traced, removals, samples, measure)[..., 0]
        assert alone == pytest.approx(found[..., place], rel=1e-5, abs=1e-6)
    for removed, rows in zip(removals, found, strict=True):
        for sample, (own, divergence, agreement) in zip(samples, rows, strict=True):
            theirs = logits_of(model, sample)
            with skipped(traced, removed):
                ours = logits_of(model, sample)
            assert own == pytest.approx(float(cross_entropy(ours, sample[1:])), rel=1e-5)
            p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
            expected = float(kl_div(q, p, reduction="batchmean", log_target=True))
            assert divergence == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))


def test_losses_and_their_gradient_are_those_of_the_whole_logits(model: tf.PreTrainedModel, small_chunks: None) -> None:
    samples = random_samples(LENGTHS)
    halves, batch = split_model(model), make_batches(samples, 5)[0]
    with frozen(model):
        hidden = halves.hidden_of(batch).detach().requires_grad_(True)
        found = sample_losses(halves, hidden, batch)
        weights = torch.arange(1.0, 6.0)  # so that the samples' gradients are told apart
        (gradient,) = torch.autograd.grad(found @ weights, hidden)

        reference = hidden.detach().clone().requires_grad_(True)
        whole = halves.logits(reference.flatten(0, 1)).view(*reference.shape[:2], -1)  # (batch, length, vocabulary)
        rows = []
        for row, logits in zip(batch.indices, whole, strict=True):
            labels = samples[row][1:]
            rows.append(cross_entropy(logits[: len(labels)], labels))
        (expected,) = torch.autograd.grad(torch.stack(rows) @ weights, reference)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    for row, value in zip(batch.indices, found.tolist(), strict=True):
        assert value == pytest.approx(plain_loss(model, samples[row]).item(), rel=1e-5)


def test_the_form_of_single_removals_is_that_of_the_whole_logits(model: tf.PreTrainedModel, small_chunks: None) -> None:
    """Five tokens of each sample, spread over it."""
    samples = random_samples(LENGTHS)
    found = gauss_newton(model, samples, positions=5, batch_size=3, progress=False)
    traced = trace_model(model)
    for sample, matrix in zip(samples, found.matrices, strict=True):
        used = torch.linspace(0, len(sample) - 2, min(5, len(sample) - 1)).long()
        whole = logits_of(model, sample)[used].double()  # (tokens, vocabulary)
        changes = []
        for block in range(traced.depth):
            with skipped(traced, [block]):
                changes.append(logits_of(model, sample)[used] - whole)
        z = torch.stack(changes)  # (6, tokens, vocabulary)
        p = whole.softmax(-1)
        centred = z - (p * z).sum(-1, keepdim=True)
        expected = torch.einsum("tv,itv,jtv->ij", p, centred, centred) / (2 * len(used))
        torch.testing.assert_close(
            torch.from_numpy(matrix).double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )


def test_a_model_that_cannot_be_split_gives_the_same() -> None:
    whole, apart = tiny_model("gemma2"), tiny_model("gemma2")
    whole.__class__ = Restless
    samples = random_samples(LENGTHS)
    assert not split_model(whole).is_split
    assert split_model(apart).is_split
    torch.testing.assert_close(losses_of(whole, samples, 3), losses_of(apart, samples, 3))
    found = [measured(trace_model(model), [(1,), (0, 2)], samples, quality, batch_size=2) for model in (whole, apart)]
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)
    forms = [gauss_newton(model, samples, progress=False).hessian for model in (whole, apart)]
    assert forms[0] == pytest.approx(forms[1], rel=1e-4, abs=1e-6)


class Restless(tf.Gemma2ForCausalLM):  # type: ignore[misc]
    """Its forward pass needs more than one token, so that the head cannot be run on none."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        assert output.logits.shape[1] > 0
        return output


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements that any result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_a_batch_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, tokens, width = 4000, 32, 8
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * vocabulary * tokens)
    config = tf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
    )
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    traced, samples = trace_model(model), [torch.arange(64) + i for i in range(4)]
    batch = make_batches(samples, 4)[0]
    with Largest() as largest:  # type: ignore[no-untyped-call]
        measured(traced, [(1,), (2,)], samples, quality)
        gauss_newton(model, samples, positions=64, progress=False)
        losses_of(model, samples)
        with frozen(model):
            gate_gradients(traced, batch)
            gate_gradients(traced, batch, label_seed=0)
    assert largest.elements == tokens * vocabulary
