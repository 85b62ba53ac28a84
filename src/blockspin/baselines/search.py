"""Methods that search by measuring shortened models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from ..model.batches import BatchSize, token_mean
from ..model.passes import num_passes
from ..model.quality import Measure, kl, loss, measured
from ..model.tracing import trace_model
from ..problem import Floats, Removal, RemovalProblem
from ..progress import bar
from ..solvers.candidates import Candidate, fill
from .greedy import remove_greedily

MOST_SWAPS = 3  # blocks that a mutation exchanges
IDLE = 20  # after so many generations of nothing but the parent there are no other removals


def sleb(
    model: nn.Module,
    samples: Sequence[Tensor],
    problem: RemovalProblem,
    *,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Candidate:
    """SLEB (arXiv 2402.09025): M times, remove the block without which the measured loss is lowest.

    Every block that may go is measured together with those already gone. With sub-layers as units it is BlockPruner
    (arXiv 2406.10594).

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    name = "SLEB" if problem.units == "blocks" else "BlockPruner"
    return _greedy(model, samples, problem, loss, name, batch_size, progress)


def finercut(
    model: nn.Module,
    samples: Sequence[Tensor],
    problem: RemovalProblem,
    *,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Candidate:
    """As FinerCut (arXiv 2405.18218): M times, remove the sub-layer without which the output changes least.

    The change is the KL divergence from the whole model. The units are those of the problem.

    Raises:
        ValueError: unusable samples, or a divergence that is NaN or infinite.
    """
    return _greedy(model, samples, problem, kl, "FinerCut", batch_size, progress)


def _greedy(
    model: nn.Module,
    samples: Sequence[Tensor],
    problem: RemovalProblem,
    measure: Measure,
    name: str,
    batch_size: BatchSize,
    progress: bool,
) -> Candidate:
    """Remove the unit without which the measure is lowest, together with those already gone, until the goal is met."""
    traced = trace_model(model, problem.units)

    def means(removed: Removal, free: Sequence[int]) -> Floats:
        longer = [(*removed, i) for i in free]
        values = measured(traced, longer, samples, measure, batch_size=batch_size)[..., 0]  # (free, samples)
        return token_mean(values, samples)

    return remove_greedily(problem, means, name, progress=progress)


def evopress(
    model: nn.Module,
    samples: Sequence[Tensor],
    problem: RemovalProblem,
    *,
    budget: float = 64.0,
    offspring: int = 16,
    survivors: int = 4,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Candidate:
    """EvoPress (arXiv 2410.14649): (1 + lambda) evolution over removals, fitness KL(original || shortened model).

    A generation makes `offspring` mutants of the parent; they are measured on an eighth of the samples, drawn anew each
    time, the best `survivors` of them on all, and the best of those replaces the parent if its KL is lower. The first
    parent is the best of a generation of random removals. A mutation puts back s removed blocks and removes others at
    random, s the smaller of two draws from 1 to `MOST_SWAPS`. It ends after about `budget` forward passes over all
    samples, the same unit as that of our own selection; the paper spends far more.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    traced = trace_model(model, problem.units)
    generator = np.random.default_rng(seed)
    few = max(1, len(samples) // 8)
    spent = 0.0  # passes over all samples

    def divergences(removals: Sequence[Removal], on: Sequence[Tensor]) -> list[float]:
        nonlocal spent
        spent += num_passes(traced, [(), *removals]) * len(on) / len(samples)
        values = measured(traced, removals, on, kl, batch_size=batch_size)[..., 0]
        means: list[float] = token_mean(values, on).tolist()
        return means

    def fittest(removals: Sequence[Removal]) -> tuple[float, Removal]:
        """Of those that are best on a few samples the best on all of them, behind its divergence."""
        drawn = generator.choice(len(samples), few, replace=False).tolist()
        ranking = np.argsort(divergences(removals, [samples[i] for i in drawn]), kind="stable")
        chosen = [removals[i] for i in ranking[:survivors]]
        return min(zip(divergences(chosen, samples), chosen, strict=True))

    first = [fill(problem, generator.permutation(problem.num_blocks).tolist()) for _ in range(offspring)]
    generation, parent, lowest, idle = sorted(set(first)), first[0], math.inf, 0
    with bar(progress) as display:
        task = display.add_task("EvoPress", total=budget)
        while spent < budget and idle < IDLE:
            if generation:
                divergence, removed = fittest(generation)
                if divergence < lowest:
                    parent, lowest = removed, divergence

            display.update(task, completed=spent)
            generation = sorted({mutated(problem, parent, generator) for _ in range(offspring)} - {parent})
            idle = 0 if generation else idle + 1
    return Candidate(parent, "EvoPress", problem.energy(parent))


def mutated(problem: RemovalProblem, removed: Removal, generator: np.random.Generator) -> Removal:
    """A removal that keeps most of `removed`: a few blocks are put back and others go in their place.

    Where nothing else can go in its place, a block that was put back goes again.
    """
    shuffled = generator.permutation(removed).tolist()
    swaps = int(generator.integers(1, MOST_SWAPS + 1, size=2).min())
    back, stay = shuffled[:swaps], shuffled[swaps:]

    # Blocks in a random order go in place of those put back, as far as the problem allows.
    others = [i for i in generator.permutation(problem.num_blocks).tolist() if i not in removed]
    return fill(problem, [*stay, *others, *back])
