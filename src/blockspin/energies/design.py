"""Which removals to measure next, so that a form fitted to them holds where it is used: at its lowest states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..model.passes import num_passes
from ..model.tracing import TracedModel
from ..problem import Block, Budget, Floats, Goal, Removal, RemovalProblem
from ..solvers import solve
from ..solvers.candidates import fill, without_spare
from .measurements import Measurements, logarithms

BIASES = (0.5, 1.0, 2.0)  # how strongly random removals avoid blocks whose removal alone costs much
LOWEST = 20  # low states among which the next removals are chosen
CHECKED = 4  # lowest states that must have been measured
CHECK_SECONDS = 20.0  # for finding them


def problems_for(
    blocks: Sequence[Block],
    singles: Floats,
    goal: Goal | None,
    protect: Sequence[int],
    budgets: Sequence[Budget] = (),
) -> list[RemovalProblem]:
    """Goal and budgets as one problem; with neither, one for every number of blocks from an eighth to a half of them.

    singles: (N,) what removing each block alone costs; the problem's energy is the sum of the logarithms.

    Raises:
        ValueError: no removal meets them.
    """
    form = np.diag(logarithms(singles))
    if goal is not None or budgets:
        return [RemovalProblem.for_goal(form, goal, blocks=blocks, protect=protect, budgets=budgets)]

    n = len(blocks)
    most = _most(n, protect)
    least = min(max(1, round(n / 8)), most)
    return [RemovalProblem(form, size, blocks=blocks, protect=protect) for size in range(least, most + 1)]


def any_number(blocks: Sequence[Block], singles: Floats, protect: Sequence[int]) -> RemovalProblem:
    """At least half of the blocks, or of those that may go: what budgets without a number of blocks can lead to.

    All other numbers of `problems_for` are measured; beyond them a form can be far too low, and then the solution of
    a small budget would be to remove almost everything.
    """
    n = len(blocks)
    half = Budget("half of the blocks", (1,) * n, _most(n, protect), n)
    return RemovalProblem(np.diag(logarithms(singles)), blocks=blocks, protect=protect, budgets=[half])


def _most(n: int, protect: Sequence[int]) -> int:
    """Half of n blocks, or as many as are not protected."""
    return min(max(1, n // 2), n - len(set(protect)))


def random_removals(
    problems: Sequence[RemovalProblem], singles: Floats, generator: np.random.Generator
) -> Iterator[Removal]:
    """Removals that just meet the goal of one of the problems, without end; what costs little goes more often.

    The chance that a block is the next to go is proportional to its single KL to the power of minus the bias: the order
    of scores with Gumbel noise is such a drawing. Budgets are met without a block more than they need, so that the
    depth is that of the removals of least energy.
    """
    costs = logarithms(singles)
    while True:
        problem = problems[int(generator.integers(len(problems)))]
        bias = float(generator.choice(BIASES))
        order = np.argsort(bias * costs - generator.gumbel(size=len(costs))).tolist()
        yield without_spare(problem, fill(problem, order), order)


def lowest_removals(
    problems: Sequence[RemovalProblem], forms: Sequence[Floats], known: Measurements, generator: np.random.Generator
) -> Iterator[Removal]:
    """Low states of the problems with each of the forms in turn, without end; those measured least come first.

    forms: matrices (N, N) of quadratic forms.
    """
    times = known.times()
    low: dict[tuple[int, int], list[Removal]] = {}  # of each problem with each form
    while True:
        place = int(generator.integers(len(problems)))
        for number, form in enumerate(forms):
            if (place, number) not in low:
                states = solve(problems[place].with_energy(form), states=LOWEST, solver="tabu").states
                low[place, number] = [state.removed for state in states]

            # Of equally often measured ones the lowest.
            removed = min(low[place, number], key=lambda removed: times[removed])
            times[removed] += 1
            yield removed


def unmeasured_lowest(problems: Sequence[RemovalProblem], form: Floats, known: Measurements) -> list[Removal]:
    """Of the `CHECKED` lowest states, or of the ground state where there are several problems, those not measured yet.

    A search that starts from good removals does not see what the exact solver sees: states unlike any measured one, for
    which the form (N, N) is too low because nothing has contradicted it.
    """
    times, states = known.times(), CHECKED if len(problems) == 1 else 1
    lowest: dict[Removal, None] = {}
    for problem in problems:
        spectrum = solve(problem.with_energy(form), states=states, time_limit=CHECK_SECONDS)
        lowest |= {state.removed: None for state in spectrum.states}
    return [removed for removed in lowest if not times[removed]]


def affordable(traced: TracedModel, wanted: Iterator[Removal], passes: float) -> list[Removal]:
    """The first of the wanted removals, each once, that can be measured on one sample in about so many passes."""
    taken: dict[Removal, None] = {}
    most = int(4 * passes) + 1  # where there are few removals, the same ones come again and again
    for _ in range(most):
        taken[next(wanted)] = None
        if num_passes(traced, [(), *taken]) > passes:
            break
    return list(taken)
