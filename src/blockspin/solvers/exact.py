"""Branch and bound: the lowest removals, with proof.

A tabu search supplies good removals, the semidefinite relaxation a convex form of the energy, and the tree search
(tree.py) rules out everything else. Open subtrees wait in a queue ordered by their lower bounds, which begins with the
roots (roots.py); each thread takes the most promising one, walks it depth-first for a limited number of nodes, and puts
back what is left. The least bound in the queue therefore holds for everything not yet found, at any moment.
"""

from __future__ import annotations

import heapq
import itertools
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from ..problem import Floats, RemovalProblem
from .moves import Pool, Terms, copied, merge, pool_rows, terms_of, worst
from .node import FREE, Node
from .relaxation import Shift
from .roots import OpenNode, open_roots
from .spectrum import SearchResult, Statistics
from .stopping import Stop
from .subproblem import Form, decide, relaxed_below, shift_below
from .tabu import search
from .threads import num_workers
from .tree import explore, joined, keep_leaf

NODES_PER_SUBTREE = 30000
NODES_IN_STALE_FORM = 1000  # which take about as long as to make a fresh form
LONG_QUEUE = 2000
START_RESTARTS = 12


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
        shift = shift_below(terms, np.full(n, FREE, np.int8))
        pool, _ = search(problem, shift.x, states, seed, START_RESTARTS, stop)
        least, statistics = search_tree(terms, shift, pool, stop)

    # What is not in the pool lies above its highest energy, or below a node that is still open.
    worst = pool.energy[-1] if pool.size[0] == states else np.inf
    return SearchResult(pool_rows(pool, n), min(least, worst) + problem.reduced.constant, statistics | stop.reason())


def search_tree(terms: Terms, shift: Shift, pool: Pool, stop: Stop) -> tuple[float, Statistics]:
    """Work the queue until it is empty or the search must stop; completes pool, returns the least bound still open."""
    workers = num_workers()
    cut = np.array([worst(pool)])  # (1,) the lowest energy to beat, shared between threads
    terms, roots = open_roots(terms, shift, cut[0], stop)

    # (lower bound, number, node): the number decides between equal bounds.
    number = itertools.count()
    queue = [(root.bound, next(number), root) for root in roots]
    heapq.heapify(queue)
    running: set[Future[SubtreeResult]] = set()
    nodes, turns = 0, 0

    with ThreadPoolExecutor(workers) as threads:
        while queue or running:
            while queue and len(running) < workers and not stop.flag[0]:
                _, _, node = heapq.heappop(queue)
                limit = NODES_IN_STALE_FORM if node.stale else NODES_PER_SUBTREE
                if len(queue) >= LONG_QUEUE:
                    limit = 1 << 60
                running.add(threads.submit(search_subtree, terms, node, copied(pool), cut, stop, limit))
            if not running:
                break

            done, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                for node in result.left:
                    heapq.heappush(queue, (node.bound, next(number), node))
                merge(pool, result.pool, terms.resolution)
                nodes, turns = nodes + result.seen, turns + 1
            stop.expired()

    least = queue[0][0] if queue else np.inf  # what comes first in the heap is the lowest
    return least, {"nodes": nodes, "turns": turns}


def search_subtree(terms: Terms, root: OpenNode, pool: Pool, cut: Floats, stop: Stop, limit: int) -> SubtreeResult:
    """Walk so many nodes below an open node, in its form or in a fresh one; completes pool."""
    terms, assignment = terms._replace(quota=root.quota), root.assignment.copy()
    free = decide(terms, assignment)
    if free < 0 or root.bound >= cut[0] - terms.resolution:
        return SubtreeResult([], pool, 1)
    if free == 0:
        keep_leaf(terms, assignment, pool)
        return SubtreeResult([], pool, 1)

    relaxed, start = root.form or relaxed_below(terms, assignment)
    rows = len(start.z) + 2  # a depth-first walk leaves at most one waiting node on each level
    stack = Node._make(np.tile(values, (rows, 1)) for values in start)
    lower = np.full(rows, root.bound)
    height, seen = explore(terms, relaxed, assignment, start, stack, lower, pool, cut, stop.flag, limit)

    # What turned out large in a stale form is worth a fresh one. Most of what waits when a walk ends is small.
    if height > 0 and root.stale:
        return SubtreeResult([root._replace(form=None, stale=False)], pool, seen)
    left: list[OpenNode] = []
    for row in range(height):
        waiting = Node._make(values[row] for values in stack)
        below = joined(relaxed, assignment, waiting.assignment)
        left.append(OpenNode(float(lower[row]), below, root.quota, Form(relaxed, waiting), stale=True))
    return SubtreeResult(left, pool, seen)
