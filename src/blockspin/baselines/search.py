"""Methods that search by measuring shortened models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from ..model.passes import num_passes
from ..model.quality import shared_losses, shared_qualities
from ..model.tracing import trace_model
from ..problem import RemovalProblem
from ..progress import bar, track
from ..solvers.candidates import Candidate, fill, open_blocks

IDLE = 20  # after so many generations of nothing but the parent there are no other removals


def sleb(
    model: nn.Module, samples: Sequence[Tensor], problem: RemovalProblem, *, batch_size: int = 8, progress: bool = False
) -> Candidate:
    """SLEB (arXiv 2402.09025): M times, remove the block without which the measured loss is lowest.

    Every block that may go is measured together with those already gone.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    traced = trace_model(model)
    removed, loss = problem.reduced.always, None
    steps = int(problem.reduced.need.sum()) if problem.reduced.equality else problem.num_blocks
    for _ in track(range(steps), "SLEB", steps, show=progress):
        if free := open_blocks(problem, removed):
            losses = shared_losses(traced, [(*removed, i) for i in free], samples, batch_size=batch_size)
            removed, loss = (*removed, free[int(np.argmin(losses))]), min(losses)
    removed = tuple(sorted(removed))
    return Candidate(removed, "SLEB", problem.energy(removed), loss)


def evopress(
    model: nn.Module,
    samples: Sequence[Tensor],
    problem: RemovalProblem,
    *,
    budget: float = 64.0,
    offspring: int = 16,
    survivors: int = 4,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> Candidate:
    """EvoPress (arXiv 2410.14649): (1 + lambda) evolution over removals, fitness KL(original || shortened model).

    A generation makes `offspring` mutants of the parent; they are measured on an eighth of the samples, drawn anew each
    time, the best `survivors` of them on all, and the best of those replaces the parent if its KL is lower. The first
    parent is the best of a generation of random removals. A mutation puts back s removed blocks and removes others at
    random, s the smaller of two draws from 1 to 3. It ends after about `budget` forward passes over all samples, the
    same unit as that of our own selection; the paper spends far more.

    Raises:
        ValueError: unusable samples, or a loss that is NaN or infinite.
    """
    traced = trace_model(model)
    generator = np.random.default_rng(seed)
    few = max(1, len(samples) // 8)
    spent = 0.0

    def fitness(removals: Sequence[tuple[int, ...]], on: Sequence[Tensor]) -> list[float]:
        nonlocal spent
        spent += num_passes(traced, [(), *removals]) * len(on) / len(samples)
        return [quality.kl for quality in shared_qualities(traced, removals, on, batch_size=batch_size)]

    pool = [fill(problem, generator.permutation(problem.num_blocks).tolist()) for _ in range(offspring)]
    parent, best, idle = pool[0], float("inf"), 0
    with bar(progress) as display:
        task = display.add_task("EvoPress", total=budget)
        while spent < budget and idle < IDLE:
            pool = sorted(set(pool) - {parent} if best < float("inf") else set(pool))
            idle = 0 if pool else idle + 1
            if pool:
                subset = [samples[i] for i in generator.choice(len(samples), few, replace=False)]
                first = fitness(pool, subset)
                chosen = [pool[i] for i in np.argsort(first, kind="stable")[:survivors]]
                kl, removed = min(zip(fitness(chosen, samples), chosen, strict=True))
                if kl < best:
                    parent, best = removed, kl
            display.update(task, completed=spent)
            pool = [mutated(problem, parent, generator) for _ in range(offspring)]
    return Candidate(parent, "EvoPress", problem.energy(parent))


def mutated(problem: RemovalProblem, removed: Sequence[int], generator: np.random.Generator) -> tuple[int, ...]:
    """A removal that keeps most of `removed`: a few blocks are put back and others go in their place.

    Where nothing else can go in its place, a block that was put back goes again.
    """
    shuffled = generator.permutation(removed).tolist()
    swaps = int(generator.integers(1, 4, size=2).min())
    back, stay = shuffled[:swaps], shuffled[swaps:]
    others = [i for i in generator.permutation(problem.num_blocks).tolist() if i not in removed]
    return fill(problem, [*stay, *others, *back])
