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
from numpy.typing import NDArray

from ..problem import Floats, Ints, RemovalProblem
from .bounds import tighten
from .corners import corners_of
from .moves import Pool, Terms, copied, heavy_first, merge, pool_rows, terms_of, worst
from .node import FREE, Assignment, Node, Relaxed, propagate, refresh
from .relaxation import Shift, convex_shift, even_shift
from .spectrum import SearchResult, Statistics
from .stopping import Stop
from .tabu import search
from .threads import num_workers
from .tree import explore, joined, keep_leaf

NODES_PER_SUBTREE = 30000
LONG_QUEUE = 2000
START_RESTARTS = 12
FIRST_STRIDE = 0.05  # of a price, before it is known better
EPSILON = float(np.finfo(np.float64).eps)


class OpenNode(NamedTuple):
    """A lower bound of everything below a node, what is decided there (n,), and what its budgets ask for (budgets,)."""

    bound: float
    assignment: Assignment
    least: Floats


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
    cut = np.array([worst(pool)])  # (1,) the lowest energy to beat, shared between threads
    terms, roots = open_roots(terms, pool, cut[0])

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
                limit = NODES_PER_SUBTREE if len(queue) < LONG_QUEUE else 1 << 60
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


def open_roots(terms: Terms, pool: Pool, cut: float) -> tuple[Terms, list[OpenNode]]:
    """Where the search begins: at every corner of the budgets that the convex form of the whole problem leaves open.

    Also returns the terms in which the budgets are those of the corners. pool: low removals; cut: the energy to beat.
    """
    terms, corners = corners_of(terms)
    nothing = np.full(len(terms.linear), FREE, np.int8)
    roots = [OpenNode(-np.inf, nothing, least) for least in corners]
    if len(roots) == 1:
        return terms, roots

    # One d is convex for all of them; only the prices differ. It is that of the corner which the best removal reaches.
    (lowest,) = pool_rows(Pool(pool.energy[:1], pool.bits[:1], np.ones(1, np.int64)), len(terms.linear))
    reached = np.flatnonzero(np.all(corners <= terms.weight @ lowest, axis=1))
    shift = convex_shift(*terms._replace(least=corners[reached[0]])[:7])
    left = []
    for root in roots:
        relaxed, node = relaxed_below(terms._replace(least=root.least), nothing, shift)
        bound, _ = tighten(relaxed, node, cut - 2.0 * relaxed.guard, -np.inf)
        if bound < np.inf:
            left.append(root._replace(bound=bound))
    return terms, left


def search_subtree(terms: Terms, root: OpenNode, pool: Pool, cut: Floats, stop: Stop, limit: int) -> SubtreeResult:
    """Relax an open node afresh, and walk so many nodes below it; completes pool."""
    terms, assignment = terms._replace(least=root.least), root.assignment.copy()
    free = decide(terms, assignment)
    if free < 0 or root.bound >= cut[0] - terms.resolution:
        return SubtreeResult([], pool, 1)
    if free == 0:
        keep_leaf(terms, assignment, pool)
        return SubtreeResult([], pool, 1)

    relaxed, start = relaxed_below(terms, assignment)
    rows = len(start.z) + 2  # a depth-first walk leaves at most one waiting node on each level
    stack = Node._make(np.tile(values, (rows, 1)) for values in start)
    lower = np.full(rows, root.bound)
    height, seen = explore(terms, relaxed, assignment, start, stack, lower, pool, cut, stop.flag, limit)

    left: list[OpenNode] = []
    for row in range(height):
        below = joined(relaxed, assignment, stack.assignment[row])
        left.append(OpenNode(float(lower[row]), below, root.least))
    return SubtreeResult(left, pool, seen)


def decide(terms: Terms, assignment: Assignment) -> int:
    """Fix what the constraints force in assignment (n,); returns how many stay free, -1 if nothing is allowed."""
    t = terms
    return propagate(assignment, t.group, t.quota, t.exactly, t.weight, t.least, t.heavy, len(assignment))


class OpenPart(NamedTuple):
    """The energy and the constraints of the free variables, n of them, below a node."""

    block: Ints  # (n,) the problem's variables
    q: Floats  # (n, n)
    c: Floats  # (n,)
    constant: float  # what the variables decided before contribute
    group: Ints  # (n,) ascending
    quota: Floats  # (groups,) how many still go
    weight: Floats  # (budgets, n) of the budgets that still need something
    least: Floats  # (budgets,) what they need
    lacking: NDArray[np.bool_]  # (all budgets,) which they are


def open_part(terms: Terms, assignment: Assignment) -> OpenPart:
    """What is left of a problem where some variables are decided."""
    # The energy of the free variables: those that are removed add to its linear term and its constant.
    free, ones = np.flatnonzero(assignment == FREE), np.flatnonzero(assignment == 1)
    q = terms.quadratic[np.ix_(free, free)]
    c = terms.linear[free] + 2.0 * terms.quadratic[np.ix_(free, ones)].sum(axis=1)
    constant = float(terms.quadratic[np.ix_(ones, ones)].sum() + terms.linear[ones].sum())

    # How many of the groups that still have free variables go, and what the budgets still need.
    taken = np.bincount(terms.group[ones], minlength=len(terms.quota))
    open_groups, group = np.unique(terms.group[free], return_inverse=True)
    quota = (terms.quota - taken)[open_groups]
    weight, least = terms.weight[:, free], terms.least - terms.weight[:, ones].sum(axis=1)
    lacking = least > 0.0
    return OpenPart(free, q, c, constant, group, quota, weight[lacking], least[lacking], lacking)


def relaxed_below(terms: Terms, assignment: Assignment, shift: Shift | None = None) -> tuple[Relaxed, Node]:
    """The convex form of what is open below a node, and its relaxed solution; by default in its own relaxation.

    shift: of the whole problem, if nothing is decided.
    """
    guard, part = 0.5 * terms.resolution, open_part(terms, assignment)
    q, c, group, quota, weight, least = part.q, part.c, part.group, part.quota, part.weight, part.least

    # d makes the energy convex and leaves it as it is on binaries. Where the best d has numbers so large that rounding
    # would spoil the bounds, the plainest one does.
    if shift is None:
        d, x, price = convex_shift(q, c, group, quota, terms.exactly, weight, least)
    else:
        d, x, price = shift.d, shift.x, shift.price[part.lacking]
    if safe_steps(q - np.diag(d), c + d, guard) < 10:
        d = even_shift(q)
    a, b = q - np.diag(d), c + d

    # No price may weigh more than all slopes together, (budgets,), so that what it adds is rounded no worse.
    slopes = float(np.sum(np.abs(b) + 2.0 * np.abs(a).sum(axis=1)))
    dearest = slopes / np.maximum(least, weight.max(axis=1))
    heavy = heavy_first(group, weight)

    # Without exact counts a slack takes up what is left of the one group.
    top = np.ones(len(c))
    if not terms.exactly:
        a, b, group = np.pad(a, (0, 1)), np.append(b, 0.0), np.append(group, 0)
        weight = np.pad(weight, ((0, 0), (0, 1)))
        top, x = np.append(top, quota), np.append(x, max(0.0, quota[0] - x.sum()))

    relaxed = Relaxed(
        a=a,
        b=b,
        top=top,
        group=group,
        quota=quota,
        exactly=terms.exactly,
        weight=np.ascontiguousarray(weight),
        least=least,
        heavy=heavy,
        dearest=dearest,
        first=np.searchsorted(group, np.arange(len(quota) + 1)),
        diagonal=np.diag(a).copy(),
        num_binary=len(c),
        block=part.block,
        constant=part.constant,
        guard=guard,
        refresh=safe_steps(a, b, guard),
    )

    return relaxed, _first_node(relaxed, x, np.minimum(price, dearest))


def _first_node(relaxed: Relaxed, x: Floats, price: Floats) -> Node:
    """Nothing decided, at the relaxed solution x (v,) and its prices (budgets,)."""
    v = len(relaxed.b)
    node = Node(
        assignment=np.full(v, FREE, np.int8),
        z=x,
        gradient=np.zeros(v),
        order=np.argsort(relaxed.group, kind="stable"),
        price=price,
        stride=np.maximum(FIRST_STRIDE * price, 1e-6 * relaxed.dearest),
        steps=np.zeros(1, np.int64),
    )
    refresh(relaxed, node)
    return node


def safe_steps(a: Floats, b: Floats, guard: float) -> int:
    """After how many updates the rounding error of a gradient could still not lift a bound by more than the guard."""
    slope = float((np.abs(b) + 2.0 * np.abs(a).sum(axis=1)).max())
    return 1000 if slope == 0.0 else int(min(1000.0, guard / (4.0 * EPSILON * len(b) * slope)))
