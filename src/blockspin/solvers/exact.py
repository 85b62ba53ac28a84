"""Branch and bound: the lowest removals, with proof.

A tabu search supplies good removals, the semidefinite relaxation a convex form of the energy, and the tree search
(tree.py) rules out everything else. Open subtrees wait in a queue ordered by their lower bounds; each thread takes the
most promising one, walks it depth-first for a limited number of nodes, and puts back what is left. The least bound in
the queue therefore holds for everything not yet found, at any moment.
"""

from __future__ import annotations

import heapq
import os
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from ..problem import RemovalProblem
from . import tabu
from .moves import Pool, Terms, empty_pool, insert, pool_rows, terms_of
from .relaxation import convex_shift
from .spectrum import Found, Statistics
from .stopping import Stop
from .tree import FREE, REFRESH, Fates, Node, Relaxed, explore, refresh

NODES_PER_TURN = 2000
LONG_QUEUE = 2000
START_RESTARTS = 12
Open = tuple[float, int, Fates]


def exact(problem: RemovalProblem, states: int, time_limit: float | None, seed: int) -> Found:
    """The lowest removals and the proof that they are; at a time limit or Ctrl-C, the best found and a bound."""
    n = len(problem.reduced.block)
    with Stop(time_limit) as stop:
        terms = terms_of(problem.reduced, problem.resolution)
        pool, _ = tabu.search(problem, states, seed, START_RESTARTS, stop)
        relaxed = relaxed_form(terms)
        least, statistics = _search_tree(terms, relaxed, pool, stop)
    worst = pool.energy[-1] - 2.0 * relaxed.guard if pool.size[0] == states else np.inf
    return Found(pool_rows(pool, n), min(least, worst) + problem.reduced.constant, statistics | stop.reason())


def relaxed_form(terms: Terms) -> Relaxed:
    """The convex form of the problem, with a slack variable if it has a budget."""
    n = len(terms.linear)
    d = convex_shift(terms.quadratic, terms.linear, terms.group, terms.weight, terms.need, terms.equality)
    a, b, weight, need, group = terms.quadratic - np.diag(d), terms.linear + d, terms.weight, terms.need, terms.group
    if not terms.equality:
        a, b, group = np.pad(a, (0, 1)), np.append(b, 0.0), np.append(group, 0)
        weight = np.append(weight, weight.sum() - need[0])
        need = np.array([terms.weight.sum()])
    unit = weight.max()
    top = weight / unit
    slopes = np.abs(b) + 2.0 * (np.abs(a) @ np.ones(len(b)))
    guard = 4.0 * REFRESH * float(np.finfo(np.float64).eps) * len(b) * float(slopes.max())
    return Relaxed(a / np.outer(top, top), b / top, top, need / unit, weight, need, group, n, guard)


def _search_tree(terms: Terms, relaxed: Relaxed, pool: Pool, stop: Stop) -> tuple[float, Statistics]:
    """Work the queue until it is empty or the search must stop; completes pool, returns the least bound still open."""
    workers = min(2, os.cpu_count() or 1)
    cut = np.array([np.inf])
    queue: list[Open] = [(-np.inf, 0, np.full(len(relaxed.b), FREE, np.int8))]
    running: dict[Future[tuple[list[Open], Pool, int]], float] = {}
    nodes, turns = 0, 0
    root = -np.inf
    with ThreadPoolExecutor(workers) as threads:
        while (queue or running) and not stop.expired():
            while queue and len(running) < workers:
                bound, _, fate = heapq.heappop(queue)
                limit = NODES_PER_TURN if len(queue) < LONG_QUEUE else 1 << 60
                own = Pool(pool.energy.copy(), pool.bits.copy(), pool.size.copy())
                running[threads.submit(_turn, terms, relaxed, fate, bound, own, cut, stop, limit)] = bound
            for done in wait(running, timeout=0.1, return_when=FIRST_COMPLETED).done:
                del running[done]
                left, found, seen = done.result()
                nodes += seen
                turns += 1
                for bound, _, fate in left:
                    heapq.heappush(queue, (bound, turns, fate)) if False else queue.append((bound, len(queue) + nodes, fate))
                heapq.heapify(queue)
                for place in range(found.size[0]):
                    insert(pool, found.energy[place], found.bits[place], terms.resolution)
        stop.flag[0] = 1
    for done in running:
        left, found, seen = done.result()
        queue += left
        nodes += seen
        for place in range(found.size[0]):
            insert(pool, found.energy[place], found.bits[place], terms.resolution)
    least = min((bound for bound, _, _ in queue), default=np.inf)
    return least, {"nodes": nodes, "turns": turns}


def _turn(
    terms: Terms, relaxed: Relaxed, fate: Fates, bound: float, pool: Pool, cut: np.ndarray, stop: Stop, limit: int
) -> tuple[list[Open], Pool, int]:
    """One thread's turn at an open node: the nodes left open below it, the pool with what was found, nodes seen."""
    v = len(relaxed.b)
    work = Node(fate.copy(), np.zeros(v), np.zeros(v), np.arange(v), np.zeros(1, np.int64))
    refresh(relaxed, work)
    rows = v + 2
    stack = Node(
        np.zeros((rows, v), np.int8), np.zeros((rows, v)), np.zeros((rows, v)), np.zeros((rows, v), np.int64), np.zeros(rows, np.int64)
    )
    stack.fate[0], stack.z[0], stack.gradient[0], stack.order[0] = work.fate, work.z, work.gradient, work.order
    lower = np.zeros(rows)
    lower[0] = bound
    height, seen = explore(terms, relaxed, work, stack, lower, pool, cut, stop.flag, limit)
    return [(float(lower[r]), 0, stack.fate[r].copy()) for r in range(height)], pool, seen
