"""Per-sample gradients of the loss with respect to the gates, and the Hessian estimate H = A^T A / m made of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from ..files import replacing
from ..model.batches import Batch, check_finite, drawn_labels, frozen, make_batches, sample_losses
from ..model.gates import gated
from ..model.tracing import TracedModel, trace_model
from ..problem import Block
from ..progress import track

Labels = Literal["text", "model"]


@dataclass(frozen=True)
class Gradients:
    """What the calibration samples say about the blocks.

    matrix: (num_samples, num_blocks) float32, the paper's A: d loss_s / d alpha_i at alpha = 1.
    blocks: the blocks of the model, one a column.
    losses: (num_samples,) float32, token-mean cross-entropy of each sample under the whole model, in nats.
    metadata: where the gradients come from (model, calibration set, seed, ...), as text.
    """

    matrix: NDArray[np.float32]
    blocks: tuple[Block, ...]
    losses: NDArray[np.float32]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hessian(self) -> NDArray[np.float64]:
        """H = A^T A / num_samples, (num_blocks, num_blocks): the empirical Fisher estimate of the curvature."""
        a = self.matrix.astype(np.float64)
        hessian: NDArray[np.float64] = a.T @ a / len(a)
        return hessian

    @property
    def mean_gradient(self) -> NDArray[np.float64]:
        """g, (num_blocks,): mean of A over the samples, the first-order term that `beta` weighs."""
        mean: NDArray[np.float64] = self.matrix.astype(np.float64).mean(axis=0)
        return mean

    def resampled(self, generator: np.random.Generator) -> Gradients:
        """As many samples, drawn with replacement: one bootstrap replicate."""
        rows = generator.integers(0, len(self.matrix), len(self.matrix))
        return replace(self, matrix=self.matrix[rows], losses=self.losses[rows])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; the blocks and the metadata are in its header."""
        # One entry, because the order of several is not fixed: equal gradients make equal files.
        header = {"blockspin": json.dumps({"blocks": [asdict(b) for b in self.blocks], "metadata": self.metadata})}
        with replacing(path) as temporary:
            temporary.write_bytes(save({"matrix": self.matrix, "losses": self.losses}, metadata=header))

    @staticmethod
    def load(path: str | Path) -> Gradients:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, it is truncated, or it holds something else.
        """
        if not Path(path).is_file():
            raise ValueError(f"no gradients file at {path}; make one with `blockspin gradients`")
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get("blockspin", "null"))
                if header is None:
                    raise ValueError(
                        f"{path} is not a gradients file of blockspin; make one with `blockspin gradients`"
                    )
                blocks = tuple(Block(**entry) for entry in header["blocks"])
                return Gradients(file.get_tensor("matrix"), blocks, file.get_tensor("losses"), header["metadata"])
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}); compute it again") from error


def estimate_gradients(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    labels: Labels = "text",
    seed: int = 0,
    batch_size: int = 8,
    gradient_checkpointing: bool = False,
    partial: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: bool = True,
) -> Gradients:
    """The gradient of each sample's loss with respect to each block's gate: the paper's A, and with it H.

    One backward pass a batch, of the sum of its samples' losses: with a gate for every sample and block, the gradients
    of different samples do not mix. Only gates get gradients, no parameters. The result does not depend on batch size,
    order or padding beyond rounding.

    Args:
        model: a causal language model of transformers, on any device or spread by `device_map`.
        samples: 1-D int64 tensors of at least two token ids.
        labels: "text" takes the samples' own tokens as labels, so that H is the empirical Fisher matrix (the paper);
            "model" draws them from the model's predictions, so that H estimates the Fisher matrix itself, the
            Gauss-Newton curvature of the KL divergence from the whole model.
        seed: of the drawn labels.
        batch_size: samples in one pass; lower it when memory runs out.
        gradient_checkpointing: keep only each block's input for the backward pass: less memory, a third more time.
        partial: a file to which each finished batch is added. If a run was cut off, the same call with the same file
            continues it. Remove the file once the result is saved.
        metadata: kept in the result.
        progress: show a bar with the time left.

    Raises:
        ValueError: unusable samples, a model whose blocks cannot be found or which is not causal, a loss that is NaN
            or infinite, a partial file of another model or other samples, or memory that runs out.
    """
    batches = make_batches(samples, batch_size)
    traced = trace_model(model)
    matrix = np.zeros((len(samples), traced.depth), dtype=np.float32)
    losses = np.full(len(samples), np.nan, dtype=np.float32)
    identity = fingerprint(model, samples, labels, seed if labels == "model" else 0)
    finished = Partial(partial, identity) if partial is not None else None
    for index, row in finished.read() if finished is not None else ():
        losses[index], matrix[index] = row[0], row[1:]
    remaining = [batch for batch in batches if np.isnan(losses[list(batch.indices)]).any()]
    done = len(batches) - len(remaining)
    with frozen(model):
        for batch in track(remaining, "Gradients", len(batches), done, progress):
            batch_losses, batch_gradients = gate_gradients(
                traced, batch, gradient_checkpointing, seed if labels == "model" else None
            )
            rows = np.column_stack([batch_losses, batch_gradients])
            if finished is not None:
                finished.append(batch.indices, rows)
            losses[list(batch.indices)], matrix[list(batch.indices)] = rows[:, 0], rows[:, 1:]
    return Gradients(matrix, traced.blocks, losses, metadata or {})


def gate_gradients(
    traced: TracedModel,
    batch: Batch,
    gradient_checkpointing: bool = False,
    label_seed: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Losses (batch,) and rows of A (batch, num_blocks) of one batch; call it while the model is `frozen`.

    A_si = d loss_s / d alpha_i at alpha = 1 (the paper's definition of the gradient matrix).
    label_seed: draw the labels from the model with this seed; None takes the tokens of the text.

    Raises:
        ValueError: a loss is NaN or infinite, or memory runs out.
    """
    alphas = torch.ones(len(batch.indices), traced.depth, dtype=torch.float32)
    alphas = alphas.to(next(traced.model.parameters()).device).requires_grad_(True)
    try:
        with torch.enable_grad(), gated(traced, alphas, gradient_checkpointing):
            logits = batch.forward(traced.model)
            labels = None if label_seed is None else drawn_labels(logits, batch, label_seed)
            losses = sample_losses(logits, batch, labels)
            check_finite(losses.detach(), batch)
            torch.autograd.backward(losses.sum())
    except torch.OutOfMemoryError as error:
        rows, length = batch.token_ids.shape
        raise ValueError(
            f"out of memory with {rows} samples of {length} tokens; use a smaller --batch-size or "
            "--gradient-checkpointing"
        ) from error
    assert alphas.grad is not None
    return losses.detach().float().cpu().numpy(), alphas.grad.cpu().numpy()


def fingerprint(model: nn.Module, samples: Sequence[Tensor], *settings: object) -> str:
    """A hash that tells whether results are of this model and these samples; reads 64 numbers of each parameter."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            values = parameter.detach().flatten()[:64].float().cpu().numpy()
            digest.update(values.tobytes())
    for sample in samples:
        digest.update(len(sample).to_bytes(8, "little") + sample.cpu().numpy().tobytes())
    return digest.hexdigest()


class Partial:
    """Finished rows, one JSON line a batch, so that a process killed at any moment loses at most the batch at work."""

    def __init__(self, path: str | Path, identity: str) -> None:
        self.path, self.identity = Path(path), identity

    def read(self) -> list[tuple[int, NDArray[np.float32]]]:
        """(sample index, [loss, gradient row]) of every finished sample. A line cut off by a kill is dropped."""
        text = self.path.read_text() if self.path.exists() else ""
        complete = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if not complete:
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"fingerprint": self.identity}) + "\n")
            return []
        if json.loads(complete[0]).get("fingerprint") != self.identity:
            raise ValueError(
                f"{self.path} holds results of another model, other samples or other settings; remove it, or choose "
                "another folder"
            )
        with self.path.open("r+") as file:
            file.truncate(sum(len(line.encode()) for line in complete))
        return [
            (index, np.array(row, dtype=np.float32))
            for line in complete[1:]
            for index, row in zip(*(json.loads(line)[key] for key in ("indices", "rows")), strict=True)
        ]

    def append(self, indices: Sequence[int], rows: NDArray[np.float32]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"indices": list(indices), "rows": rows.tolist()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
