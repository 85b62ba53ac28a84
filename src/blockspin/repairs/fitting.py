"""Fits the linear maps of a block, one after another, to what the residual stream lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.batches import Batch, BatchSize, frozen, make_batches
from ..model.tracing import TracedModel
from .aims import Aim
from .least_squares import Fit, NormalEquations, solve
from .projections import Projection, change, look_at_blocks, matrix, num_inputs, projections_of, with_constant
from .readings import Reading, readings_of
from .report import Step
from .walk import Walk

HELD_OUT = 1 / 16  # of the samples
TOKENS_PER_INPUT = 2  # at least


class Text:
    """Samples in batches, some of them held out: no weight is fitted to them.

    samples: 1-D int64 tensors of token ids. seed: draws those that are held out.

    Raises:
        ValueError: unusable samples, or a single one.
    """

    def __init__(self, samples: Sequence[Tensor], batch_size: BatchSize, seed: int) -> None:
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
        held_out = torch.tensor([index in self._held_out for index in batch.indices])[:, None]  # (batch, 1)
        return batch.filled & ~held_out, batch.filled & held_out

    def check_enough(self, inputs: int) -> None:
        """Refuse text that is too little for a linear map with so many inputs.

        Raises:
            ValueError: says how much is needed.
        """
        needed = TOKENS_PER_INPUT * inputs
        if self.num_tokens < needed:
            raise ValueError(
                f"the samples have {self.num_tokens:,} tokens besides those held out, and a linear map of {inputs:,} "
                f"inputs needs at least {needed:,} for a repair, better ten times as many; give more text "
                "(--num-samples, --energy-samples, --max-length), or leave the repair out (--no-repair)"
            )


@dataclass(frozen=True)
class Maps:
    """The linear maps of a block that a repair may change.

    projections: those whose output is added to the stream. readings: those that read it.
    """

    projections: Sequence[Projection]
    readings: Sequence[Reading]

    @property
    def names(self) -> list[str]:
        """Inside the block."""
        found = [projection.name for projection in self.projections]
        for reading in self.readings:
            found += reading.names
        return found


def find_maps(traced: TracedModel) -> list[Maps]:
    """The maps of every block.

    Raises:
        ValueError: the weights of one are quantised.
    """
    found = [Maps((), ()) for _ in traced.layers]

    def look(block: int, run: Callable[[], Any], stream: Tensor) -> None:
        projections = projections_of(traced, block, run, stream)
        outward = {projection.name for projection in projections}
        readings = readings_of(traced, block, run, stream)
        inward = [reading for reading in readings if not outward.intersection(reading.names)]
        found[block] = Maps(projections, inward)

    look_at_blocks(traced, look)
    return found


@dataclass(frozen=True)
class Fitting:
    """The shortened model while its linear maps are changed one after another.

    walk: where it is. maps: of every block. ridge, reading_ridge: see `NormalEquations.solution`, for the maps whose
    output is added to the stream and for those that read it; None leaves the latter alone.
    """

    walk: Walk
    maps: Sequence[Maps]
    text: Text
    ridge: float
    reading_ridge: float | None

    def refit(self, block: int, aims: Sequence[Aim]) -> list[Step]:
        """Change the maps of the block where the walk is, in the order in which they run, each if that helps on
        held-out text.

        block: its index in the original. aims: for each batch.

        Raises:
            ValueError: a hidden state is not finite.
        """
        maps, steps = self.maps[self.walk.block], []
        for addition in range(len(aims[0].streams) - 1):
            for reading in maps.readings:
                if reading.additions == addition and self.reading_ridge is not None:
                    steps += self._refit_reading(block, reading, aims, self.reading_ridge)
            for projection in maps.projections:
                if projection.addition == addition:
                    steps.append(self._refit_projection(block, projection, aims))
        return steps

    def _refit_projection(self, block: int, projection: Projection, aims: Sequence[Aim]) -> Step:
        """Let an out-projection bring what the stream lacks after its addition."""
        module = self.walk.layer.get_submodule(projection.name)
        sums = self._sums(num_inputs(module), aims)
        for number, aim in enumerate(aims):
            seen = self.walk.look(number, [projection.name])
            stream = seen.additions[projection.addition].float()  # (batch, length, width)
            wanted = aim.after(projection.addition).to(stream.device).float()
            inputs = with_constant(module, seen.inputs[projection.name].flatten(0, -2))  # (tokens, inputs)
            missing = ((wanted - stream) / projection.factor).flatten(0, 1)  # (tokens, width)
            self._add(sums, number, inputs, missing, wanted.flatten(0, 1))

        fit = self._solved(sums, self.ridge)
        if fit.helps:
            change(module, fit.solution)
        return Step(block, projection.name, fit.before, fit.after, fit.helps)

    def _refit_reading(self, block: int, reading: Reading, aims: Sequence[Aim], ridge: float) -> list[Step]:
        """Let in-projections see, by a linear map in front of them, what they see in the original."""
        layer = self.walk.layer
        modules = [layer.get_submodule(name) for name in reading.names]
        device = next(layer.parameters()).device
        sums = self._sums(aims[0].wanted.width + reading.has_bias, aims)
        for number, aim in enumerate(aims):
            ours, theirs = self._read(reading, number).to(device), aim.streams[reading.additions].get().to(device)
            with frozen(layer), torch.no_grad():
                seen = reading.of(layer, ours).flatten(0, 1)  # (tokens, width)
                wanted = reading.of(layer, theirs).flatten(0, 1).float()
            inputs = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1) if reading.has_bias else seen
            self._add(sums, number, inputs, wanted - seen.float(), wanted)

        fit = self._solved(sums, ridge)
        if fit.before == 0:  # before the first cut, where the maps see what they see in the original
            return []
        for module in modules if fit.helps else []:
            change(module, _in_front(fit.solution, module, reading.has_bias))
        return [Step(block, name, fit.before, fit.after, fit.helps) for name in reading.names]

    def _read(self, reading: Reading, number: int) -> Tensor:
        """The stream that in-projections read, (batch, length, width)."""
        if not reading.additions:
            return self.walk.streams[number].get()
        return self.walk.look(number).additions[reading.additions - 1]

    def _sums(self, inputs: int, aims: Sequence[Aim]) -> tuple[NormalEquations, NormalEquations]:
        """Empty sums, for the tokens to fit to and for those held out."""
        device = next(self.walk.layer.parameters()).device
        width = aims[0].wanted.width
        return NormalEquations(inputs, width, device), NormalEquations(inputs, width, device)

    def _add(
        self, sums: tuple[NormalEquations, NormalEquations], number: int, inputs: Tensor, missing: Tensor, aim: Tensor
    ) -> None:
        """Count the tokens of a batch in, each by one over the square of its aim; tensors are (tokens, ...)."""
        weights = 1 / aim.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        for part, mask in zip(sums, self.text.masks(self.walk.batches[number]), strict=True):
            rows = (mask if self.walk.batch_dim == 0 else mask.T).flatten().to(inputs.device)
            part.add(inputs[rows], missing[rows], weights[rows])

    def _solved(self, sums: tuple[NormalEquations, NormalEquations], ridge: float) -> Fit:
        if not all(math.isfinite(part.square) and bool(part.gram.isfinite().all()) for part in sums):
            raise ValueError(
                f"the hidden states at block {self.walk.block} of the shortened model are not finite; check the "
                "weights, or load the models in a wider dtype (--dtype float32)"
            )
        return solve(*sums, ridge)


def _in_front(solution: Tensor, module: nn.Module, with_bias: bool) -> Tensor:
    """The change of a map (inputs, outputs) that sees x + x D instead of x, in the shape that `change` takes.

    solution: D, (width, width); with_bias: and a last row that is added to each x.
    """
    rows = matrix(module).to(solution)
    width = solution.shape[1]
    step = solution @ rows[:width]  # (width or width + 1, outputs)
    if module.bias is not None and not with_bias:
        step = torch.cat([step, torch.zeros_like(step[:1])])
    return step
