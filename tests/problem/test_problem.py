"""The problem: its energies, its constraints, what it refuses, and its views, against plain loops over all subsets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blockspin as bs
from blockspin.problem import Block, Goal, check_goal

BLOCKS = [Block(i, "moe" if i % 3 == 0 else "attention", 10 + 7 * (i % 4)) for i in range(7)]
RNG = np.random.default_rng(5)
H = (lambda a: a + a.T)(RNG.normal(size=(7, 7)))
G = RNG.normal(size=7)
SIZES = bs.Budget("sizes", tuple(block.num_parameters for block in BLOCKS), 60, 143)
CACHE = bs.Budget("cache", tuple(0 if block.kind == "moe" else 5 for block in BLOCKS), 11, 20)
PROBLEMS = {
    "count": bs.RemovalProblem(H, remove=3),
    "protected": bs.RemovalProblem(H, remove=3, protect=[0, 5]),
    "kinds": bs.RemovalProblem(H, remove={"moe": 1, "attention": 2}, blocks=BLOCKS),
    "one kind": bs.RemovalProblem(H, remove={"moe": 2}, blocks=BLOCKS, protect=[1]),
    "whole kind": bs.RemovalProblem(H, remove={"moe": 3, "attention": 1}, blocks=BLOCKS),
    "first order": bs.RemovalProblem(H, remove=2, beta=0.7, gradient=G),
    "first order of the expansion": bs.RemovalProblem(H, remove=2, beta=-1.0, gradient=G),
    "budget": bs.RemovalProblem(H, remove_parameters=0.45, blocks=BLOCKS, beta=0.7, gradient=G),
    "budgets": bs.RemovalProblem(H, budgets=[SIZES, CACHE]),
    "budgets, protected": bs.RemovalProblem(H, budgets=[SIZES, CACHE], protect=[0, 2]),
    "share and budget": bs.RemovalProblem(H, remove_parameters=0.45, blocks=BLOCKS, budgets=[CACHE]),
    "count and budgets": bs.RemovalProblem(H, remove=4, budgets=[SIZES, CACHE]),
    "kinds and budget": bs.RemovalProblem(H, remove={"moe": 2, "attention": 1}, blocks=BLOCKS, budgets=[SIZES]),
}


COUNTED = [name for name in PROBLEMS if "budget" not in name]


def subsets(n: int) -> list[tuple[int, ...]]:
    return [c for m in range(n + 1) for c in itertools.combinations(range(n), m)]


def naive_energy(problem: bs.RemovalProblem, removed: tuple[int, ...]) -> float:
    total = 0.0
    for i in removed:
        total += 2 * problem.beta * float(np.zeros(7)[i] if problem.beta == 0 else G[i])
        for j in removed:
            total += float(H[i, j])
    return total


def wanted(name: str, removed: tuple[int, ...]) -> bool:
    moe = sum(BLOCKS[i].kind == "moe" for i in removed)
    parameters = sum(BLOCKS[i].num_parameters for i in removed)
    size = parameters / sum(b.num_parameters for b in BLOCKS)
    both = parameters >= 60 and 5 * (len(removed) - moe) >= 11 and len(removed) < 7
    return {
        "count": len(removed) == 3,
        "protected": len(removed) == 3 and not {0, 5} & set(removed),
        "kinds": moe == 1 and len(removed) == 3,
        "one kind": moe == 2 and len(removed) == 2 and 1 not in removed,
        "whole kind": moe == 3 and len(removed) == 4,
        "first order": len(removed) == 2,
        "first order of the expansion": len(removed) == 2,
        "budget": size >= 0.45 and len(removed) < 7,
        "budgets": both,
        "budgets, protected": both and not {0, 2} & set(removed),
        "share and budget": size >= 0.45 and 5 * (len(removed) - moe) >= 11 and len(removed) < 7,
        "count and budgets": both and len(removed) == 4,
        "kinds and budget": moe == 2 and len(removed) == 3 and parameters >= 60,
    }[name]


@pytest.mark.parametrize("name", PROBLEMS)
def test_energies_and_constraints_are_those_of_the_definition(name: str) -> None:
    problem = PROBLEMS[name]
    for removed in subsets(7):
        assert problem.allows(removed) == wanted(name, removed)
        assert problem.energy(removed) == pytest.approx(naive_energy(problem, removed), abs=1e-12)
    if name in COUNTED:
        assert problem.num_candidates == sum(wanted(name, removed) for removed in subsets(7))
    rows = np.array([[i in removed for i in range(7)] for removed in subsets(7)])
    assert problem.energies(rows) == pytest.approx([problem.energy(removed) for removed in subsets(7)], abs=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_reduced_problem_has_the_same_energies(name: str) -> None:
    problem, r = PROBLEMS[name], PROBLEMS[name].reduced
    for row in itertools.product([False, True], repeat=len(r.block)):
        y = np.array(row, dtype=float)
        (removed,) = problem.blocks_of(np.array([row], dtype=bool).reshape(1, -1))
        energy = r.constant + y @ r.quadratic @ y + r.linear @ y
        assert energy == pytest.approx(naive_energy(problem, removed), abs=1e-12)


def test_energy_does_not_depend_on_the_order_of_summation() -> None:
    big = np.array([[1e16, 1.0, -1e16], [1.0, 1.0, 1.0], [-1e16, 1.0, 1e16]])
    problem = bs.RemovalProblem(big, remove=2)
    assert problem.energy([0, 2]) == problem.energy([2, 0]) == 0.0


def bad_symmetry() -> np.ndarray:
    h = H.copy()
    h[1, 4] += 1.0
    return h


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hessian": H[:3]}, "square"),
        ({"hessian": np.zeros((0, 0))}, "square"),
        ({"hessian": bad_symmetry()}, r"symmetric.*\(1, 4\)"),
        ({"hessian": np.full((7, 7), np.nan)}, "finite"),
        ({"remove": 0}, "at least 1 and fewer than the 7"),
        ({"remove": -2}, "at least 1"),
        ({"remove": 7}, "fewer than the 7"),
        ({"remove": 2.0}, "whole number"),
        ({"remove": True}, "whole number"),
        ({"remove": 6, "protect": [1, 2]}, "only 5 of 7"),
        ({"protect": [7]}, "0 to 6"),
        ({"protect": [-1]}, "0 to 6"),
        ({"remove": {"moe": 1}}, "needs blocks"),
        ({"remove": {"mamba": 1}, "blocks": BLOCKS}, "kinds are attention, moe"),
        ({"remove": {"moe": 4}, "blocks": BLOCKS}, "1 to 3"),
        ({"remove": {"moe": 0}, "blocks": BLOCKS}, "1 to 3"),
        ({"remove": {"moe": 3, "attention": 4}, "blocks": BLOCKS}, "fewer than the 7"),
        ({"remove": {}, "blocks": BLOCKS}, "at least 1"),
        ({"blocks": BLOCKS[:5]}, "5 entries"),
        ({"beta": 1.0}, "needs gradient"),
        ({"beta": float("inf"), "gradient": G}, "finite"),
        ({"beta": float("nan"), "gradient": G}, "finite"),
        ({"beta": 1.0, "gradient": G[:3]}, "7 finite"),
        ({"remove": None}, "exactly one"),
        ({"remove_parameters": 0.5}, "exactly one"),
        ({"remove": None, "remove_parameters": 0.5}, "needs blocks"),
        ({"remove": None, "remove_parameters": 1.0, "blocks": BLOCKS}, "between 0 and 1"),
        ({"remove": None, "remove_parameters": 0.99, "blocks": BLOCKS}, "at most"),
        ({"remove": None, "remove_parameters": 0.6, "blocks": BLOCKS, "protect": [1, 2, 3]}, "protected"),
    ],
)
def test_mistakes_are_refused_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bs.RemovalProblem(**{"hessian": H, "remove": 3, **arguments})


def test_one_block_cannot_be_removed() -> None:
    with pytest.raises(ValueError, match="fewer than the 1"):
        bs.RemovalProblem([[1.0]], remove=1)


def test_asymmetry_of_rounding_is_accepted_and_removed() -> None:
    h = H.astype(np.float32).astype(np.float64)
    h[0, 1] *= 1 + 1e-8
    problem = bs.RemovalProblem(h, remove=3)
    assert np.array_equal(problem.hessian, problem.hessian.T)


def states_of(problem: bs.RemovalProblem) -> list[tuple[np.ndarray, tuple[int, ...]]]:
    """Every 0/1 vector over the reduced variables, with the removal it stands for."""
    rows = np.array(list(itertools.product([False, True], repeat=len(problem.reduced.block))))
    return list(zip(rows.astype(float), problem.blocks_of(rows), strict=True))


@pytest.mark.parametrize("name", COUNTED)
def test_qubo_and_ising_views_have_our_energies(name: str) -> None:
    problem = PROBLEMS[name]
    q, offset = problem.qubo()
    h, j, shift = problem.ising()
    for x, removed in states_of(problem):
        s = 2 * x - 1
        energy = x @ q @ x + offset
        assert h @ s + s @ j @ s + shift == pytest.approx(energy, abs=1e-9)
        if problem.allows(removed):
            assert energy == pytest.approx(problem.energy(removed), abs=1e-9)
        else:
            assert energy >= problem.energy(removed) + problem.penalty() - 1e-9


@pytest.mark.parametrize("name", COUNTED)
def test_bqm_and_coo_views_have_our_energies(name: str, tmp_path: Path) -> None:
    pytest.importorskip("dimod")
    problem = PROBLEMS[name]
    bqm, path = problem.to_bqm(penalty=50.0), tmp_path / "problem.coo"
    problem.write_coo(path, penalty=50.0)
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    entries = np.loadtxt(path, ndmin=2)
    assert comments[0] == "# vartype=BINARY"
    for x, removed in states_of(problem):
        if problem.allows(removed):
            sample = dict(zip(problem.reduced.block.tolist(), x.astype(int).tolist(), strict=True))
            from_file = sum(v * sample[int(a)] * sample[int(b)] for a, b, v in entries)
            assert bqm.energy(sample) == pytest.approx(problem.energy(removed), abs=1e-9)
            assert from_file + float(comments[1].split("=")[1]) == pytest.approx(problem.energy(removed), abs=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_cqm_view_has_our_energies_and_constraints(name: str) -> None:
    pytest.importorskip("dimod")
    problem = PROBLEMS[name]
    cqm = problem.to_cqm()
    for x, removed in states_of(problem):
        sample = dict(zip(problem.reduced.block.tolist(), x.astype(int).tolist(), strict=True))
        assert cqm.check_feasible(sample) == problem.allows(removed)
        assert cqm.objective.energy(sample) == pytest.approx(problem.energy(removed), abs=1e-9)


@pytest.mark.parametrize("name", [name for name in PROBLEMS if "budget" in name])
def test_budgets_have_no_qubo_view(name: str) -> None:
    with pytest.raises(ValueError, match="to_cqm"):
        PROBLEMS[name].qubo()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 8), st.sampled_from([1e-9, 1.0, 1e9]))
def test_default_penalty_makes_the_lowest_qubo_state_the_lowest_allowed_one(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(n, n)) * scale
    problem = bs.RemovalProblem(h + h.T, remove=int(rng.integers(1, n)))
    q, _ = problem.qubo()
    _, removed = min(states_of(problem), key=lambda state: state[0] @ q @ state[0])
    assert problem.allows(removed)
    assert problem.energy(removed) == min(problem.energy(r) for _, r in states_of(problem) if problem.allows(r))


GOALS = [0, 1, 6, 7, 8, {"moe": 2}, {"moe": 3}, {"moe": 9}, {"mamba": 1}, {"moe": 3, "attention": 4}, {}]
SHARES = [0.0, 0.2, 0.5, 0.9, 0.999, 1.5]


@pytest.mark.parametrize("protect", [(), (0, 3), range(7)])
@pytest.mark.parametrize("goal", [*GOALS, *SHARES])
def test_a_goal_is_refused_exactly_where_no_removal_meets_it(goal: Goal, protect: Iterable[int]) -> None:
    """Against all subsets that take a block and leave a block; without energies."""
    total = sum(block.num_parameters for block in BLOCKS)

    def met(removed: tuple[int, ...]) -> bool:
        kinds = Counter(BLOCKS[i].kind for i in removed)
        if isinstance(goal, float):
            return sum(BLOCKS[i].num_parameters for i in removed) >= goal * total
        return kinds == goal if isinstance(goal, dict) else len(removed) == goal

    possible = [c for c in subsets(7) if 0 < len(c) < 7 and not {*c} & {*protect} and met(c)]
    if possible and goal != 0:
        check_goal(BLOCKS, goal, protect)
        return
    with pytest.raises(ValueError, match=r"remove|share"):
        check_goal(BLOCKS, goal, protect)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([None, 1, 3, {"moe": 2, "attention": 1}]))
def test_budgets_are_refused_exactly_where_no_removal_meets_them(seed: int, goal: int | dict[str, int] | None) -> None:
    """Against all subsets that leave a block; the message names what at most can go."""
    rng = np.random.default_rng(seed)
    protect = [int(i) for i in rng.choice(7, size=int(rng.integers(0, 3)), replace=False)]
    budgets = []
    for k in range(int(rng.integers(1, 4))):
        weight = rng.integers(0, 9, size=7).tolist()
        budgets.append(bs.Budget(f"goal {k}", tuple(weight), int(rng.integers(1, max(2, sum(weight)))), sum(weight)))

    def possible(kept: list[bs.Budget]) -> list[tuple[int, ...]]:
        found = []
        for removed in subsets(7)[:-1]:
            kinds = Counter(BLOCKS[i].kind for i in removed)
            counted = goal is None or (kinds == goal if isinstance(goal, dict) else len(removed) == goal)
            enough = all(sum(budget.weight[i] for i in removed) >= budget.least for budget in kept)
            if counted and enough and not {*removed} & {*protect}:
                found.append(removed)
        return found

    if possible(budgets):
        check_goal(BLOCKS, goal, protect, budgets)
        return

    # The first that is out of reach, with those before it met; where the numbers are, it says that.
    number = next(k for k in range(4) if not possible(budgets[:k])) - 1
    if number < 0:
        with pytest.raises(ValueError, match="remove"):
            check_goal(BLOCKS, goal, protect, budgets)
        return
    weight = budgets[number].weight
    most = max(sum(weight[i] for i in removed) for removed in possible(budgets[:number]))
    with pytest.raises(ValueError, match=rf"goal {number}: out of reach.* at most {most} of {sum(weight)} can go"):
        check_goal(BLOCKS, goal, protect, budgets)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([bs.Budget("size", (1,) * 6, 2, 6)], "6 weights for 7 blocks"),
        ([bs.Budget("size", (1,) * 7, 0, 7)], "size: the model meets that already"),
        ([], "exactly one"),
    ],
)
def test_budgets_that_say_nothing_are_refused(budgets: list[bs.Budget], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bs.RemovalProblem(H, budgets=budgets)


@pytest.mark.parametrize("weight", [(-1, 2), (1.5, 2), (True, 2)])
def test_budgets_count_in_whole_numbers(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"size.*(not negative|whole number)"):
        bs.Budget("size", weight, 1, 2)


def test_protected_blocks_of_a_goal_must_exist() -> None:
    with pytest.raises(ValueError, match="block indices are 0 to 6"):
        check_goal(BLOCKS, 2, [7])
