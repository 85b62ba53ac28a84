"""Branch and bound: the lowest removals, with proof.

A tabu search supplies good removals, the semidefinite relaxation a convex form of the energy, and the tree search
(tree.py) rules out everything else. Open subtrees wait in a queue ordered by their lower bounds; each thread takes the
most promising one, walks it depth-first for a limited number of nodes, and puts back what is left. The least bound in
the queue therefore holds for everything not yet found, at any moment.
"""

from __future__ import annotations

import heapq
import itertools
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from ..problem import Floats, RemovalProblem
from .moves import Pool, Terms, copied, merge, pool_rows, terms_of
from .node import FREE, Assignment, Node, Relaxed, propagate, refresh
from .relaxation import convex_shift, even_shift
from .spectrum import SearchResult, Statistics
from .stopping import Stop
from .tabu import search
from .threads import num_workers
from .tree import explore, joined, keep_leaf

NODES_PER_SUBTREE = 30000
LONG_QUEUE = 2000
START_RESTARTS = 12
EPSILON = float(np.finfo(np.float64).eps)


OpenNode = tuple[float, Assignment]  # a lower bound of everything below the node, and what is decided there (n,)


class SubtreeResult(NamedTuple):
    """What one thread brings back from an open node: the nodes left below it, the lowest removals, nodes seen."""

    left: list[OpenNode]
    pool: Pool
    seen: int


def exact(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> SearchResult:
    """The lowest removals and the proof that they are; at a time limit or Ctrl-C, the best found and a bound."""
    n = len(problem.reduced.block)
    with Stop(time_limit) as stop:
        terms = terms_of(problem.reduced, problem.resolution)
        pool, _ = search(problem, states, seed, START_RESTARTS, stop)
        least, statistics = search_tree(terms, pool, stop)

    # What is not in the pool lies above its highest energy, or below a node that is still open.
    worst = pool.energy[-1] if pool.size[0] == states else np.inf
    return SearchResult(pool_rows(pool, n), min(least, worst) + problem.reduced.constant, statistics | stop.reason())


def search_tree(terms: Terms, pool: Pool, stop: Stop) -> tuple[float, Statistics]:
    """Work the queue until it is empty or the search must stop; completes pool, returns the least bound still open."""
    workers = num_workers()
    cut = np.array([np.inf])  # (1,) the lowest energy to beat, shared between threads

    # (lower bound, number, assignment): the number decides between equal bounds.
    number = itertools.count()
    queue = [(-np.inf, next(number), np.full(len(terms.linear), FREE, np.int8))]
    running: set[Future[SubtreeResult]] = set()
    nodes, turns = 0, 0

    with ThreadPoolExecutor(workers) as threads:
        while queue or running:
            while queue and len(running) < workers and not stop.flag[0]:
                bound, _, assignment = heapq.heappop(queue)
                limit = NODES_PER_SUBTREE if len(queue) < LONG_QUEUE else 1 << 60
                running.add(threads.submit(search_subtree, terms, assignment, bound, copied(pool), cut, stop, limit))
            if not running:
                break

            done, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                for bound, assignment in result.left:
                    heapq.heappush(queue, (bound, next(number), assignment))
                merge(pool, result.pool, terms.resolution)
                nodes, turns = nodes + result.seen, turns + 1
            stop.expired()

    least = queue[0][0] if queue else np.inf  # what comes first in the heap is the lowest
    return least, {"nodes": nodes, "turns": turns}


def search_subtree(
    terms: Terms, assignment: Assignment, bound: float, pool: Pool, cut: Floats, stop: Stop, limit: int
) -> SubtreeResult:
    """Relax the open node of this assignment (n,) afresh, and walk so many nodes below it; completes pool."""
    free = decide(terms, assignment)
    if free < 0 or bound >= cut[0] - terms.resolution:
        return SubtreeResult([], pool, 1)
    if free == 0:
        keep_leaf(terms, assignment, pool)
        return SubtreeResult([], pool, 1)

    relaxed, start = relaxed_below(terms, assignment)
    rows = len(start.z) + 2  # a depth-first walk leaves at most one waiting node on each level
    stack = Node._make(np.tile(values, (rows, 1)) for values in start)
    lower = np.full(rows, bound)
    height, seen = explore(terms, relaxed, assignment, start, stack, lower, pool, cut, stop.flag, limit)

    left: list[OpenNode] = []
    for row in range(height):
        left.append((float(lower[row]), joined(relaxed, assignment, stack.assignment[row])))
    return SubtreeResult(left, pool, seen)


def decide(terms: Terms, assignment: Assignment) -> int:
    """Fix what the constraints force in assignment (n,); returns how many stay free, -1 if nothing is allowed."""
    n = len(assignment)
    if terms.equality:
        return propagate(assignment, terms.weight, terms.need, terms.group, n)

    # A budget is an equality with a slack variable that takes up what goes beyond it.
    spare = terms.weight.sum() - terms.need[0]
    with_slack, group = np.append(assignment, np.int8(FREE)), np.append(terms.group, 0)
    free = propagate(with_slack, np.append(terms.weight, spare), np.array([terms.weight.sum()]), group, n)
    assignment[:] = with_slack[:n]
    return free


def relaxed_below(terms: Terms, assignment: Assignment) -> tuple[Relaxed, Node]:
    """The convex form of what is open below a node, in its own semidefinite relaxation, and its relaxed solution."""
    guard = 0.5 * terms.resolution

    # The energy of the free variables: those that are removed add to its linear term and its constant.
    free, ones = np.flatnonzero(assignment == FREE), np.flatnonzero(assignment == 1)
    q = terms.quadratic[np.ix_(free, free)]
    c = terms.linear[free] + 2.0 * terms.quadratic[np.ix_(free, ones)].sum(axis=1)
    constant = float(terms.quadratic[np.ix_(ones, ones)].sum() + terms.linear[ones].sum())

    # What the groups that still have free variables need.
    taken = np.bincount(terms.group[ones], terms.weight[ones], len(terms.need))
    open_groups, group = np.unique(terms.group[free], return_inverse=True)
    weight, need = terms.weight[free], (terms.need - taken)[open_groups]

    # d makes the energy convex and leaves it as it is on binaries. Where the best d has numbers so large that rounding
    # would spoil the bounds, the plainest one does.
    d, x = convex_shift(q, c, group, weight, need, terms.equality)
    if safe_steps(q - np.diag(d), c + d, guard) < 10:
        d = even_shift(q)
    a, b = q - np.diag(d), c + d

    if not terms.equality:
        a, b, group, x = np.pad(a, (0, 1)), np.append(b, 0.0), np.append(group, 0), np.append(x, 0.0)
        weight, need = np.append(weight, weight.sum() - need[0]), np.array([weight.sum()])

    # Scaled, so that moving z between two variables keeps the sum of their group.
    top = weight / weight.max()
    a, b = a / np.outer(top, top), b / top
    relaxed = Relaxed(
        a=a,
        b=b,
        top=top,
        need=need / weight.max(),
        weight=weight,
        whole_need=need,
        group=group,
        first=np.searchsorted(group, np.arange(len(need) + 1)),
        diagonal=np.diag(a).copy(),
        num_binary=len(free),
        block=free,
        constant=constant,
        guard=guard,
        refresh=safe_steps(a, b, guard),
    )

    v = len(b)
    node = Node(
        assignment=np.full(v, FREE, np.int8),
        z=x * top,
        gradient=np.zeros(v),
        order=np.argsort(group, kind="stable"),
        steps=np.zeros(1, np.int64),
    )
    refresh(relaxed, node)
    return relaxed, node


def safe_steps(a: Floats, b: Floats, guard: float) -> int:
    """After how many updates the rounding error of a gradient could still not lift a bound by more than the guard."""
    slope = float((np.abs(b) + 2.0 * np.abs(a).sum(axis=1)).max())
    return 1000 if slope == 0.0 else int(min(1000.0, guard / (4.0 * EPSILON * len(b) * slope)))
