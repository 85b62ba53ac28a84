"""Energies from shortened models instead of gradients: what the text says of every block and every pair of blocks.

The gradients describe the loss near the whole model; a removal is far from it. Here blocks are really removed, one
(`gauss_newton` with step 1) or two (`measure_pairs`) at a time, and the energy is a quadratic model of what that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..journal import Journal
from ..model import fingerprint
from ..model.batches import Batch, BatchSize, check_finite, frozen, make_batches
from ..model.gates import gated
from ..model.head import SplitModel, widened
from ..model.passes import num_passes, over_removals
from ..model.quality import MEASURES, measured
from ..model.quantization import rounds_activations
from ..model.tracing import TracedModel, trace_model
from ..problem import Block, Floats, Removal, RemovalProblem, Units
from ..processes import gathered, share
from ..progress import console, track
from ..solvers import solve
from .energies import Energies, finished_rows, keep_rows

NARROW_STEP = 0.5  # of a gate in 16 bits, or with activations in 8


@dataclass(frozen=True, repr=False)
class Interactions(Energies):
    """A quadratic form of each sample, whose mean over the tokens is the matrix of the energy.

    matrices: (num_samples, num_blocks, num_blocks) float32, symmetric, in nats; NaN where a pair was not measured.
    tokens: (num_samples,) int64, predicted tokens of each sample: its weight in the mean.
    blocks: the blocks of the model. metadata: where the numbers come from, as text.
    """

    shapes: ClassVar[dict[str, tuple[str, ...]]] = {
        "matrices": ("samples", "blocks", "blocks"),
        "tokens": ("samples",),
    }

    matrices: NDArray[np.float32]
    tokens: NDArray[np.int64]
    blocks: tuple[Block, ...]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hessian(self) -> Floats:
        """(num_blocks, num_blocks): the energy of a removal x is x^T hessian x, an estimate in nats a token."""
        return self._moments()[0]

    @property
    def standard_errors(self) -> Floats:
        """(num_blocks, num_blocks): of every entry of `hessian`, from the scatter between samples; inf with one."""
        mean, weights = self._moments()
        apart = np.nan_to_num(self.matrices.astype(np.float64) - mean)  # (num_samples, N, N)
        number = (weights > 0).sum(axis=0)  # (N, N) samples on which the pair was measured
        with np.errstate(divide="ignore", invalid="ignore"):
            errors: Floats = np.sqrt((weights**2 * apart**2).sum(axis=0) * number / (number - 1))
        errors[number < 2] = np.inf
        return errors

    def resampled(self, generator: np.random.Generator) -> Interactions:
        """As many samples, drawn with replacement: one bootstrap replicate; unmeasured pairs keep their mean."""
        rows = generator.integers(0, len(self.matrices), len(self.matrices))
        matrices = self.matrices[rows]  # (num_samples, N, N)
        matrices = np.where(np.isnan(matrices).all(axis=0), self.hessian, matrices).astype(np.float32)
        return replace(self, matrices=matrices, tokens=self.tokens[rows])

    def _moments(self) -> tuple[Floats, Floats]:
        """The weighted mean of the matrices, and the weights (num_samples, N, N), which sum to 1 for each entry."""
        weights = np.where(np.isnan(self.matrices), 0.0, self.tokens[:, None, None])
        weights = weights / weights.sum(axis=0)
        return (weights * np.nan_to_num(self.matrices.astype(np.float64))).sum(axis=0), weights


def measure_pairs(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    objective: Literal["kl", "loss"] = "kl",
    batch_size: BatchSize = "auto",
    units: Units = "blocks",
    partial: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: bool = True,
) -> Interactions:
    """What removing each block, and each pair of blocks, does to the objective: Q with the energy x^T Q x.

    Q_ii = L(without i) - L and 2 Q_ij = L(without i and j) - L - Q_ii - Q_jj, L the token mean over the samples of the
    KL divergence from the whole model ("kl", where L is 0) or of the cross-entropy ("loss", several times noisier).
    Removals that agree on the first blocks share the pass up to there: N(N+1)/6 passes of the whole model instead of
    N(N+1)/2. All pairs are measured on the first quarter of the samples; on the rest only those that occur together in
    a low-energy removal, which are the ones whose errors matter (`pairs_in_low_states`).

    units: what one spin stands for: a block, or each of its residual branches.
    partial: a file to which every finished batch is added; the same call continues it.

    Raises:
        ValueError: unusable samples or model, a loss that is NaN or infinite, or a partial file of something else.
    """
    traced = trace_model(model, units)
    blocks, n = traced.units, traced.num_units
    tokens = np.array(list(map(len, samples)), dtype=np.int64) - 1  # (num_samples,) that are predicted
    journal = Journal(partial, fingerprint.of_results(model, samples, objective, units))
    matrices = _finished_forms(journal, len(samples), n)

    first = min(len(samples), max(4, len(samples) // 4))
    every = list(combinations(range(n), 2))
    if progress:
        cost = num_passes(traced, [*_at_most_one(n), *every])
        console.print(
            f"{len(every)} pairs of {n} blocks cost about {cost:.0f} passes of the model for each of the first {first} "
            f"samples, and fewer for the other {len(samples) - first}.",
            highlight=False,
            soft_wrap=True,
        )

    def measure(todo: Sequence[int], pairs: Sequence[tuple[int, int]]) -> None:
        """Find the forms of some samples, batch by batch."""
        batches = make_batches([samples[i] for i in todo], batch_size)
        parts = [[todo[i] for i in batch.indices] for batch in batches]
        forms = gathered(_forms_of_parts(traced, samples, share(parts), pairs, objective))
        for part, rows in track(forms, "Pairs", len(parts), show=progress):
            matrices[part] = rows
            keep_rows(journal, part, rows)

    if todo := _unmeasured(matrices, range(first)):
        measure(todo, every)

    # The first samples tell which pairs are worth measuring on the rest.
    if todo := _unmeasured(matrices, range(first, len(samples))):
        measure(todo, pairs_in_low_states(Interactions(matrices[:first], tokens[:first], blocks)))
    return Interactions(matrices, tokens, blocks, metadata or {})


def _forms_of_parts(
    traced: TracedModel,
    samples: Sequence[Tensor],
    parts: Sequence[list[int]],
    pairs: Sequence[tuple[int, int]],
    objective: str,
) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
    """The numbers of some samples and their Q, for every part of the samples."""
    for part in parts:
        yield part, _pair_forms(traced, [samples[i] for i in part], pairs, objective)


def _pair_forms(
    traced: TracedModel, samples: Sequence[Tensor], pairs: Sequence[tuple[int, int]], objective: str
) -> NDArray[np.float32]:
    """(number of samples, N, N): Q of each sample; NaN for other pairs."""
    n, measure = traced.num_units, MEASURES[objective]
    removals = [*_at_most_one(n), *pairs]
    values = measured(traced, removals, samples, measure, batch_size=len(samples))[..., 0]  # (removals, samples)
    change = values - values[0]

    matrices = np.full((len(samples), n, n), np.nan)
    matrices[:, range(n), range(n)] = change[1 : n + 1].T
    for (i, j), both in zip(pairs, change[n + 1 :], strict=True):
        matrices[:, i, j] = matrices[:, j, i] = (both - change[1 + i] - change[1 + j]) / 2
    return matrices.astype(np.float32)


def pairs_in_low_states(interactions: Interactions, replicates: int = 4, states: int = 20) -> list[tuple[int, int]]:
    """The pairs of blocks in the lowest states of bootstrap replicates, for an eighth to a half of the blocks."""
    n, generator = len(interactions.blocks), np.random.default_rng(0)
    depths = sorted({max(1, n // 8), max(1, n // 4), max(1, 3 * n // 8), max(1, n // 2)})

    found: set[tuple[int, int]] = set()
    for _ in range(replicates):
        hessian = interactions.resampled(generator).hessian
        for remove in depths:
            if remove == n:  # a model of one block
                continue
            spectrum = solve(RemovalProblem(hessian, remove=remove), states=states, solver="tabu")
            for state in spectrum.states:
                found.update(combinations(state.removed, 2))
    return sorted(found)


def gauss_newton(
    model: nn.Module,
    samples: Sequence[Tensor],
    *,
    step: float = 1.0,
    positions: int = 64,
    batch_size: BatchSize = "auto",
    units: Units = "blocks",
    partial: str | Path | None = None,
    metadata: dict[str, str] | None = None,
    progress: bool = True,
) -> Interactions:
    """The Gauss-Newton form of the KL divergence from the whole model: Q_ij = 1/2 mean over tokens cov_p(z_i, z_j).

    z_i (vocabulary,) is how the logits change with the gate of block i, and cov_p the covariance under the prediction p
    of the whole model: KL is 1/2 var_p of a small change of the logits, and the changes of several blocks are taken to
    add up. Step 1 removes the block, which gives the secant: right for single blocks whatever their size. It costs a
    pass for each block, half of it where passes can be shared. A smaller step gives the derivative, the usual
    Gauss-Newton matrix, by the difference between gates of 1 + step/2 and 1 - step/2: two passes for each block. In 16
    bits, and where activations are rounded to 8, rounding changes the logits more than a small step does, and the step
    is at least `NARROW_STEP`.

    positions: tokens of each sample that are used, spread over it; nowhere else are logits computed.
    units: what one spin stands for: a block, or each of its residual branches.

    Raises:
        ValueError: unusable samples or model, step not in (0, 1], or a partial file of something else.
    """
    step = _step_above_rounding(model, step)
    traced = trace_model(model, units)
    n = traced.num_units
    journal = Journal(partial, fingerprint.of_results(model, samples, step, positions, units))
    matrices = _finished_forms(journal, len(samples), n)

    def run(batch: Batch, outputs: Iterator[tuple[int, Tensor]]) -> NDArray[np.float32]:
        """(batch, N, N)."""
        return _covariances(traced.halves, batch, outputs, n, positions) / np.float32(step**2)

    # What a journal has no form of is measured, batch by batch.
    todo = _unmeasured(matrices, range(len(samples)))
    missing, done = [samples[i] for i in todo], len(samples) - len(todo)
    found: Iterable[tuple[Batch, NDArray[np.float32]]] = ()
    if missing and step == 1:
        removals = _at_most_one(n)
        found = over_removals(
            traced, removals, missing, run, batch_size=batch_size, title="Blocks", done=done, progress=progress
        )
    elif missing:
        found = _with_gates_moved(traced, missing, run, step, batch_size, done, progress)

    for batch, forms in found:
        part = [todo[i] for i in batch.indices]
        matrices[part] = forms
        keep_rows(journal, part, matrices[part])

    lengths = np.array(list(map(len, samples)), dtype=np.int64)  # (num_samples,)
    tokens = np.minimum(lengths - 1, positions)  # that are used
    return Interactions(matrices, tokens, traced.units, metadata or {})


def _step_above_rounding(model: nn.Module, step: float) -> float:
    """The step, or a larger one where rounding changes the logits more. Raises ValueError where it is not in (0, 1]."""
    if not 0 < step <= 1:
        raise ValueError(f"step={step}: must be above 0 and at most 1, which removes the block")
    is_narrow = next(model.parameters()).dtype.itemsize < 4 or rounds_activations(model)
    return max(step, NARROW_STEP) if is_narrow else step


def _finished_forms(journal: Journal, num_samples: int, n: int) -> NDArray[np.float32]:
    """(num_samples, N, N): the forms that a journal holds; NaN for the other samples."""
    matrices = np.full((num_samples, n, n), np.nan, dtype=np.float32)
    for index, row in finished_rows(journal):
        matrices[index] = row.reshape(n, n)
    return matrices


def _unmeasured(matrices: NDArray[np.float32], chosen: Iterable[int]) -> list[int]:
    """Those of the chosen samples that have no form yet. matrices: (num_samples, N, N), NaN where nothing is known."""
    return [i for i in chosen if np.isnan(matrices[i, 0, 0])]


def _at_most_one(n: int) -> list[Removal]:
    """The whole model, then the removal of each block."""
    removals: list[Removal] = [()]
    for i in range(n):
        removals.append((i,))
    return removals


def _with_gates_moved(
    traced: TracedModel,
    samples: Sequence[Tensor],
    run: Callable[[Batch, Iterator[tuple[int, Tensor]]], NDArray[np.float32]],
    step: float,
    batch_size: BatchSize,
    done: int,
    progress: bool,
) -> Iterator[tuple[Batch, NDArray[np.float32]]]:
    """As `over_removals`, of the whole model (0), and with gate i raised (i + 1) and lowered (N + i + 1)."""
    device = next(traced.model.parameters()).device

    def outputs(batch: Batch) -> Iterator[tuple[int, Tensor]]:
        n = traced.num_units
        yield 0, traced.halves.hidden_of(batch)
        for k, (change, unit) in enumerate(product((step / 2, -step / 2), range(n))):
            alphas = torch.ones(len(batch.indices), n, device=device)
            alphas[:, unit] += change
            with gated(traced, alphas):
                yield k + 1, traced.halves.hidden_of(batch)

    with frozen(traced.model), traced.halves.resident_head(), torch.no_grad():
        batches = make_batches(samples, batch_size)
        forms = traced.room.shared_results(batches, lambda batch: run(batch, outputs(batch)), "Blocks", done, progress)
        yield from forms


def _covariances(
    halves: SplitModel, batch: Batch, outputs: Iterator[tuple[int, Tensor]], n: int, positions: int
) -> NDArray[np.float32]:
    """(batch, N, N): the Gauss-Newton form of each sample.

    outputs: (0, what leaves the decoder of the whole model) and (i + 1, the same with unit i changed); or of
        `_with_gates_moved`.

    Raises:
        ValueError: a form is NaN or infinite.
    """
    rows, places = _spread_over(batch, positions)  # (tokens,) each: the sample and its token
    used: dict[int, Tensor] = {}
    for k, hidden in outputs:
        used[k] = hidden[rows.to(hidden.device), places.to(hidden.device)]  # (tokens, width)
    every = torch.stack([used[k].to(used[0].device) for k in range(len(used))], dim=1)  # (tokens, models, width)

    # A chunk has the logits of all models at some of the tokens.
    parts = []
    for chunk in torch.split(every, max(1, halves.chunk // len(used))):
        parts.append(_forms(halves, chunk, n).cpu())
    forms = torch.cat(parts).double() / 2  # (tokens, N, N)

    sums = torch.zeros(len(batch.indices), *forms.shape[1:], dtype=torch.float64).index_add_(0, rows, forms)
    means = sums / rows.bincount()[:, None, None]
    check_finite(means.sum(dim=(1, 2)), batch)
    return means.numpy().astype(np.float32)


def _spread_over(batch: Batch, positions: int) -> tuple[Tensor, Tensor]:
    """So many tokens of each sample, evenly spread over those that predict one: their rows and places, (tokens,)."""
    rows, places = [], []
    for row, length in enumerate(batch.lengths.tolist()):
        number = min(length - 1, positions)
        rows.append(torch.full((number,), row))
        places.append(torch.linspace(0, length - 2, number).long())
    return torch.cat(rows), torch.cat(places)


def _forms(halves: SplitModel, hidden: Tensor, n: int) -> Tensor:
    """cov_p(z_i, z_j) at each token, (tokens, N, N).

    hidden: (tokens, models, width), first the whole model's, then those of N models, or of N and N others of which the
    differences count.

    It is the inner product of sqrt(p) (z_i - mean of z_i): one row for each block.
    """
    tokens, models = hidden.shape[:2]
    z = widened(halves.logits(hidden.flatten(0, 1))).view(tokens, models, -1)  # (tokens, models, vocabulary)
    whole = z[:, :1].clone()  # (tokens, 1, vocabulary)
    p = whole.softmax(-1)

    # In place, as these are the largest tensors there are; row 0, the whole model's, becomes zero.
    z -= whole
    if models > 1 + n:
        z[:, 1 : 1 + n] -= z[:, 1 + n :]
        z = z[:, : 1 + n]
    z -= z @ p.mT  # (tokens, 1 + N, 1), the means
    z *= p.sqrt()
    return (z @ z.mT)[:, 1:, 1:]
