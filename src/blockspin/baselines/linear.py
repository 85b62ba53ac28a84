"""Repairs by one linear map where blocks were removed, to compare with: ReplaceMe, LinearPatch and Ghosted Layers.

All look at the hidden states only where blocks are gone: at those that leave the last kept block before the cut in the
shortened and so far repaired model, and those that entered the first kept block after it in the original. Where nothing
is kept before a cut, nothing is done. All work in place; the last two leave modules that no checkpoint can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.batches import BatchSize, make_batches
from ..model.residual import stream_in, with_stream
from ..model.tracing import trace_model
from ..repairs.least_squares import NormalEquations
from ..repairs.pairing import kept_blocks
from ..repairs.projections import Projection, change, find_projections, matrix, with_constant
from ..repairs.shelf import open_shelf
from ..repairs.walk import Walk

_RIDGE = 1e-6  # the papers have none; this keeps the sums solvable
_EPOCHS = 6
_LEARNING_RATE = 1e-3
_TOKENS_A_STEP = 1024


@dataclass(frozen=True)
class Cut:
    """A place where blocks are gone; states are (tokens, width).

    layer: the last block before it in the shortened model. projection: the last out-projection of that block.
    branch: what the projection brings. left: what leaves the block. wanted: what enters the block after the cut in the
    original.
    """

    layer: nn.Module
    projection: nn.Module
    branch: Tensor
    left: Tensor
    wanted: Tensor


def replaceme(
    shortened: nn.Module,
    original: nn.Module,
    samples: Sequence[Tensor],
    *,
    cosine: bool = False,
    batch_size: BatchSize = "auto",
) -> None:
    """ReplaceMe (arXiv 2505.02819): a linear map T of the MLP's output, folded into the down projection.

    With M the MLP's output and Y the stream that it is added to, M T + Y should be the states L after the cut:
    T = (M^T M)^-1 M^T (L - Y) by least squares, or with `cosine` the T of the least mean cosine distance, by gradient
    descent from the identity.
    """

    def mend(cut: Cut) -> None:
        before = cut.left - cut.branch
        if cosine:
            transform = _least_cosine_distance(cut.branch, before, cut.wanted)
        else:
            transform = _least_squares(cut.branch, cut.wanted - before)
        old = matrix(cut.projection).float()  # (inputs, width)
        change(cut.projection, old @ transform - old)

    _mend_cuts(shortened, original, samples, batch_size, mend)


def ghosted_layers(
    shortened: nn.Module, original: nn.Module, samples: Sequence[Tensor], *, batch_size: BatchSize = "auto"
) -> None:
    """Ghosted Layers (arXiv 2605.15491): a linear module in the place of the removed blocks, by least squares."""

    def mend(cut: Cut) -> Tensor:
        return torch.eye(cut.left.shape[1], device=cut.left.device) + _least_squares(cut.left, cut.wanted - cut.left)

    _mend_cuts(shortened, original, samples, batch_size, mend)


def linear_patch(
    shortened: nn.Module, original: nn.Module, samples: Sequence[Tensor], *, batch_size: BatchSize = "auto"
) -> None:
    """LinearPatch (arXiv 2505.24680), without its training: a rotation, a scale for each channel, the rotation back.

    The scale of a rotated channel is the ratio of its mean absolute values after and before the cut. The rotation
    spreads the few huge channels over all; it is a Hadamard matrix where the width is a power of two, times a random
    orthogonal one where it is not.
    """

    def mend(cut: Cut) -> Tensor:
        rotation = _rotation(cut.left.shape[1]).to(cut.left.device)
        scale = (cut.wanted @ rotation).abs().mean(0) / (cut.left @ rotation).abs().mean(0)
        return rotation * scale @ rotation.T

    _mend_cuts(shortened, original, samples, batch_size, mend)


def _mend_cuts(
    shortened: nn.Module,
    original: nn.Module,
    samples: Sequence[Tensor],
    batch_size: BatchSize,
    mend: Callable[[Cut], Tensor | None],
) -> None:
    """Walk through both models; at each cut change the shortened one.

    mend: changes weights, or returns a map (width, width) that the states which leave the block are multiplied by.
    """
    kept = kept_blocks(shortened, original)
    batches = make_batches(samples, batch_size)
    traced = trace_model(shortened)
    projections = find_projections(traced)
    with open_shelf(original, batches) as shelf:
        ours, theirs = Walk(traced, batches, shelf), Walk(trace_model(original), batches, shelf)
        for position, end in enumerate([*kept[1:], theirs.depth]):
            while theirs.block < end:
                theirs.step()
            if end == kept[position] + 1:
                ours.step()
                continue

            layer = ours.layer
            after = mend(_cut(ours, theirs, projections[position][-1]))
            ours.step()
            if after is not None:
                ours.streams = [shelf.keep(_multiplied(stream.get(), after)) for stream in ours.streams]
                layer.register_forward_hook(_multiplying(after))


def _cut(ours: Walk, theirs: Walk, projection: Projection) -> Cut:
    """The cut behind the block where a shortened model's walk is; the original's is where the block's successor begins.

    projection: the last of the block.
    """
    module = ours.layer.get_submodule(projection.name)
    branches, left, wanted = [], [], []
    for number, batch in enumerate(ours.batches):
        filled = batch.filled.flatten()  # (batch * length,)
        seen = ours.look(number, [projection.name])
        rows = with_constant(module, seen.inputs[projection.name].flatten(0, -2))[filled]  # (tokens, inputs)
        branches.append((rows @ matrix(module)).float() * projection.factor)
        left.append(seen.additions[-1].flatten(0, 1)[filled].float())
        wanted.append(theirs.streams[number].get().flatten(0, 1)[filled].to(rows.device).float())
    return Cut(ours.layer, module, torch.cat(branches), torch.cat(left), torch.cat(wanted))


def _multiplying(after: Tensor) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: Any, output: Any) -> Any:
        return with_stream(output, _multiplied(stream_in(output), after))

    return hook


def _multiplied(stream: Tensor, after: Tensor) -> Tensor:
    """A stream (batch, length, width) times a map, in the dtype and on the device of the stream."""
    return (stream.float() @ after.to(stream.device)).to(stream.dtype)


def _least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """The map (width, width) from inputs to outputs, (tokens, width) each."""
    sums = NormalEquations(inputs.shape[1], outputs.shape[1], inputs.device)
    sums.add(inputs, outputs, torch.ones(len(inputs), device=inputs.device))
    return sums.solution(_RIDGE).float()


def _least_cosine_distance(branch: Tensor, before: Tensor, wanted: Tensor) -> Tensor:
    """The T of least mean cosine distance between branch @ T + before and wanted, by Adam from the identity."""
    transform = torch.eye(branch.shape[1], device=branch.device, requires_grad=True)
    optimiser = torch.optim.Adam([transform], lr=_LEARNING_RATE)
    steps = math.ceil(len(branch) / _TOKENS_A_STEP) * _EPOCHS
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(_EPOCHS):
        for start in range(0, len(branch), _TOKENS_A_STEP):
            m, y, z = (states[start : start + _TOKENS_A_STEP] for states in (branch, before, wanted))
            loss = 1 - torch.nn.functional.cosine_similarity(m @ transform + y, z).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return transform.detach()


def _rotation(width: int) -> Tensor:
    """An orthogonal matrix whose entries are all about as large."""
    twos = width & -width  # the largest power of two that divides the width
    hadamard = torch.ones(1, 1)
    while len(hadamard) < twos:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard) / math.sqrt(2)
    odd = torch.randn(width // twos, width // twos, generator=torch.Generator().manual_seed(0))
    return torch.kron(hadamard, torch.linalg.qr(odd).Q.contiguous())
