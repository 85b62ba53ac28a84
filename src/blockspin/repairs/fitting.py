"""Fits the out-projections of a block, one after another, to what the residual stream lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.batches import Batch, make_batches
from .least_squares import Fit, NormalEquations, solve
from .projections import Projection, change, num_inputs, with_constant
from .report import Step
from .walk import Walk

HELD_OUT = 1 / 16  # of the samples
_TOKENS_PER_INPUT = 2  # at least


class Text:
    """Samples in batches, some of them held out: no weight is fitted to them.

    samples: 1-D int64 tensors of token ids. seed: draws those that are held out.

    Raises:
        ValueError: unusable samples, or a single one.
    """

    def __init__(self, samples: Sequence[Tensor], batch_size: int, seed: int) -> None:
        if len(samples) < 2:
            raise ValueError("a repair needs two samples or more: one is held out (--num-samples)")
        number = max(1, round(HELD_OUT * len(samples)))
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        self.batches = make_batches(samples, batch_size)
        self._held_out = frozenset(order[:number])
        self.held_out = [samples[i] for i in sorted(self._held_out)]
        self.num_tokens = sum(map(len, samples)) - sum(map(len, self.held_out))  # to fit to

    def masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where a batch has tokens to fit to, and where held-out ones; (batch, length) each."""
        filled = torch.arange(batch.token_ids.shape[1]) < batch.lengths[:, None]
        held_out = torch.tensor([index in self._held_out for index in batch.indices])[:, None]
        return filled & ~held_out, filled & held_out

    def check_enough(self, inputs: int) -> None:
        """Refuse text that is too little for a linear map with so many inputs.

        Raises:
            ValueError: says how much is needed.
        """
        needed = _TOKENS_PER_INPUT * inputs
        if self.num_tokens < needed:
            raise ValueError(
                f"the samples have {self.num_tokens:,} tokens besides those held out, and a linear map of {inputs:,} "
                f"inputs needs at least {needed:,}, better ten times as many; give more text, or "
                "leave the repair out"
            )


@dataclass(frozen=True)
class Fitting:
    """The shortened model while its out-projections are changed one after another.

    walk: where it is. projections: of every block. ridge: see `NormalEquations.solution`.
    """

    walk: Walk
    projections: Sequence[Sequence[Projection]]
    text: Text
    ridge: float

    def refit(self, block: int, aims: Sequence[Sequence[Tensor]]) -> list[Step]:
        """Change the out-projections of the block where the walk is, each if that helps on held-out text.

        block: its index in the original. aims: for each batch what the residual stream should be after each addition,
        (batch, length, width).

        Raises:
            ValueError: a hidden state is not finite.
        """
        steps = []
        for projection in self.projections[self.walk.block]:
            fit = self._fit(projection, [additions[projection.addition] for additions in aims])
            if fit.helps:
                change(self.walk.layer.get_submodule(projection.name), fit.solution)
            steps.append(Step(block, projection.name, fit.before, fit.after, fit.helps))
        return steps

    def _fit(self, projection: Projection, aims: Sequence[Tensor]) -> Fit:
        """The change of an out-projection, in the shape that `projections.change` takes."""
        module = self.walk.layer.get_submodule(projection.name)
        device = next(module.parameters()).device
        shape = (num_inputs(module), aims[0].shape[-1])
        train, held_out = NormalEquations(*shape, device), NormalEquations(*shape, device)

        for number, batch in enumerate(self.text.batches):
            seen = self.walk.look(number, [projection.name])
            stream = seen.additions[projection.addition].float()  # (batch, length, width)
            aim = aims[number].to(stream.device).float()
            missing = ((aim - stream) / projection.factor).flatten(0, 1)  # (tokens, width)
            weights = 1 / aim.flatten(0, 1).square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
            inputs = with_constant(module, seen.inputs[projection.name].flatten(0, -2))  # (tokens, inputs)

            for part, mask in zip((train, held_out), self.text.masks(batch), strict=True):
                rows = (mask if self.walk.batch_dim == 0 else mask.T).flatten().to(device)
                part.add(inputs[rows], missing[rows], weights[rows])

        if not all(math.isfinite(part.square) and bool(part.gram.isfinite().all()) for part in (train, held_out)):
            raise ValueError(
                f"the hidden states at block {self.walk.block} of the shortened model are not finite; check the "
                "weights, or load the models in a wider dtype (--dtype float32)"
            )
        return solve(train, held_out, self.ridge)
