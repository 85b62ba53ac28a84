"""Every solver against plain enumeration of all subsets, and what the proofs claim against the truth."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dwave_solvers import DWAVE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import blockspin as bs
from blockspin.problem import Block, Budget
from blockspin.solvers import SOLVERS
from blockspin.solvers.bounds import bound
from blockspin.solvers.moves import terms_of
from blockspin.solvers.node import FREE, repair
from blockspin.solvers.relaxation import convex_shift
from blockspin.solvers.roots import open_roots
from blockspin.solvers.stopping import Stop
from blockspin.solvers.subproblem import relaxed_below
from blockspin.solvers.tree import branching_variable

OWN = ["exact", "enumerate", "tabu", "anneal"]
PROVING = ["exact", "enumerate", "gurobi"]
NEEDS = {"dwave-tabu": "dwave.samplers", "dwave-anneal": "dwave.samplers", "gurobi": "gurobipy"}


def blocks_for(n: int, rng: np.random.Generator) -> list[Block]:
    return [Block(i, "ab"[i % 2], int(rng.integers(1, 30))) for i in range(n)]


def random_hessian(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    a = rng.normal(size=(n, n))
    if kind == "psd":
        return a.T @ a
    if kind == "low rank":
        return a[:2].T @ a[:2]
    if kind == "whole numbers":  # with many ties
        return np.round(a + a.T)
    if kind == "equal":
        return np.ones((n, n))
    return a + a.T


def random_budgets(n: int, remove: int | None, rng: np.random.Generator) -> list[Budget]:
    """Up to three budgets that some removal meets: of any weights, or of two sorts, with zeros among them."""
    size = int(rng.integers(1, n)) if remove is None else remove
    known = rng.choice(n, size=size, replace=False)
    budgets = []
    for k in range(int(rng.integers(1, 4))):
        weight = rng.integers(0, 30, size=n) if rng.random() < 0.5 else np.where(np.arange(n) % 2, 11, 4 * (k % 2))
        weight[known[0]] += weight[known].sum() == 0
        least = int(rng.integers(1, weight[known].sum() + 1))
        budgets.append(Budget(f"budget {k}", tuple(weight.tolist()), least, int(weight.sum())))
    return budgets


def random_problem(seed: int, kind: str, constraint: str) -> bs.RemovalProblem:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 11))
    first_order = {"beta": 0.5, "gradient": rng.normal(size=n)} if rng.random() < 0.4 else {}
    common: dict[str, Any] = {"hessian": random_hessian(kind, n, rng), "blocks": blocks_for(n, rng), **first_order}
    protect = [int(i) for i in rng.choice(n, size=int(rng.integers(0, 3)), replace=False)]
    if constraint == "kinds":
        free = [sum(1 for i in range(n) if i % 2 == k and i not in protect) for k in (0, 1)]
        wanted = {"ab"[k]: int(rng.integers(1, free[k] + 1)) for k in (0, 1) if free[k]}
        if sum(wanted.values()) == n:
            wanted.popitem()
        return bs.RemovalProblem(remove=wanted, protect=protect, **common)
    if constraint == "budget":
        return bs.RemovalProblem(remove_parameters=float(rng.uniform(0.05, 0.6)), **common)
    if constraint == "budgets":
        return bs.RemovalProblem(budgets=random_budgets(n, None, rng), **common)
    if constraint == "count and budgets":
        remove = int(rng.integers(1, n))
        return bs.RemovalProblem(remove=remove, budgets=random_budgets(n, remove, rng), **common)
    return bs.RemovalProblem(remove=int(rng.integers(1, n - len(protect))), protect=protect, **common)


def all_energies(problem: bs.RemovalProblem) -> list[float]:
    n = problem.num_blocks
    subsets = (c for m in range(1, n) for c in itertools.combinations(range(n), m))
    return sorted(problem.energy(c) for c in subsets if problem.allows(c))


def check_contract(problem: bs.RemovalProblem, spectrum: bs.Spectrum) -> None:
    """What holds for the result of every solver."""
    removals = [state.removed for state in spectrum.states]
    ranks = [(state.energy, state.removed) for state in spectrum.states]
    assert len(set(removals)) == len(removals) >= 1
    assert ranks == sorted(ranks)
    for removed, state in zip(removals, spectrum.states, strict=True):
        assert problem.allows(removed)
        assert list(removed) == sorted(removed)
        assert all(type(i) is int for i in removed)
        assert state.energy == problem.energy(removed)
    assert 0 <= spectrum.num_proven <= len(spectrum.states)
    assert spectrum.lower_bound <= spectrum.states[0].energy


CONTRACT = {
    "count": random_problem(1, "psd", "count"),
    "indefinite": random_problem(2, "indefinite", "count"),
    "kinds": random_problem(3, "indefinite", "kinds"),
    "budget": random_problem(4, "psd", "budget"),
    "ties": random_problem(6, "whole numbers", "count"),
    "budgets": random_problem(7, "indefinite", "budgets"),
    "count and budgets": random_problem(8, "psd", "count and budgets"),
}


@pytest.mark.parametrize("name", CONTRACT)
@pytest.mark.parametrize("solver", [*SOLVERS, *DWAVE])
def test_every_solver_keeps_the_contract(solver: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for outside, search in DWAVE.items():
        monkeypatch.setitem(SOLVERS, outside, search)
    if solver in NEEDS:
        pytest.importorskip(NEEDS[solver])
    problem = CONTRACT[name]
    if solver.startswith("dwave") and "budget" in name:
        with pytest.raises(ValueError, match="budget"):
            bs.solve(problem, solver=solver)
        return
    spectrum = bs.solve(problem, states=6, solver=solver, seed=3)
    truth = all_energies(problem)
    check_contract(problem, spectrum)
    assert spectrum.solver == solver
    assert spectrum.states[0].energy == pytest.approx(truth[0], abs=1e-9)
    if solver in OWN:  # these small spectra are found whole by all of them
        assert [s.energy for s in spectrum.states] == pytest.approx(truth[: len(spectrum.states)], abs=1e-9)
        again = bs.solve(problem, states=6, solver=solver, seed=3)
        assert again.states == spectrum.states
    assert (spectrum.num_proven == len(spectrum.states)) == (solver in PROVING)


@pytest.mark.parametrize("solver", ["exact", "enumerate"])
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**9),
    kind=st.sampled_from(["psd", "indefinite", "low rank", "whole numbers", "equal"]),
    constraint=st.sampled_from(["count", "kinds", "budget", "budgets", "count and budgets"]),
    states=st.integers(1, 40),
)
def test_proving_solvers_equal_plain_enumeration(
    solver: str, seed: int, kind: str, constraint: str, states: int
) -> None:
    problem = random_problem(seed, kind, constraint)
    truth = all_energies(problem)[:states]
    spectrum = bs.solve(problem, states=states, solver=solver)
    check_contract(problem, spectrum)
    assert [s.energy for s in spectrum.states] == pytest.approx(truth, abs=1e-9)
    assert spectrum.num_proven == len(truth)
    assert spectrum.lower_bound == spectrum.states[0].energy


@pytest.mark.parametrize("curvature", [5.0, 0.0, -5.0, -1e9])
def test_a_free_variable_is_branched_on_whatever_its_curvature(curvature: float) -> None:
    problem = random_problem(8, "psd", "count")
    n = len(problem.reduced.block)
    relaxed, node = relaxed_below(terms_of(problem.reduced, problem.resolution), np.full(n, FREE, np.int8))
    node.assignment[: n - 2] = 0  # all but two are decided
    assert branching_variable(relaxed._replace(diagonal=np.full(n, curvature)), node) in (n - 2, n - 1)


# Where counts hold, the form of these falls along single variables that are free.
@pytest.mark.parametrize(
    ("seed", "kind", "constraint", "states"),
    [(5365, "whole numbers", "count and budgets", 13), (12134, "indefinite", "count", 9)],
)
def test_forms_that_fall_along_single_variables(seed: int, kind: str, constraint: str, states: int) -> None:
    problem = random_problem(seed, kind, constraint)
    truth = all_energies(problem)[:states]
    spectrum = bs.solve(problem, states=states, solver="exact")
    assert [s.energy for s in spectrum.states] == pytest.approx(truth, abs=1e-9)
    assert spectrum.num_proven == len(truth)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    kind=st.sampled_from(["psd", "indefinite", "low rank", "whole numbers"]),
    constraint=st.sampled_from(["count", "kinds", "budget", "budgets", "count and budgets"]),
)
@example(seed=408, kind="whole numbers", constraint="kinds")  # its relaxed solution misses a sum
def test_the_bound_at_the_root_never_exceeds_the_optimum(seed: int, kind: str, constraint: str) -> None:
    problem = random_problem(seed, kind, constraint)
    if not len(problem.reduced.block):
        return
    relaxed, node = relaxed_below(
        terms_of(problem.reduced, problem.resolution), np.full(len(problem.reduced.block), FREE, np.int8)
    )
    groups, v = len(relaxed.quota), len(node.z)
    repair(relaxed, node)  # as in the tree: the form is convex only where the group sums are right
    for _ in range(3):  # at the relaxed solution and at corners, which need not even be allowed
        at = bound(relaxed, node, np.empty(groups), np.empty(groups), np.zeros(v))
        assert at + problem.reduced.constant <= all_energies(problem)[0] + problem.resolution
        node.z[:] = relaxed.top * np.random.default_rng(seed).integers(0, 2, v)
        group_total = np.bincount(relaxed.group, node.z, groups)
        if not np.allclose(group_total, relaxed.quota):
            return
        node.gradient[:] = 2 * relaxed.a @ node.z + relaxed.b - node.price @ relaxed.weight


def problem_of_sorts(seed: int, kind: str, remove: int | None) -> bs.RemovalProblem:
    """Twelve units of two sorts or of three, in any order, with budgets on what the sorts weigh."""
    rng = np.random.default_rng(seed)
    sort = rng.permutation(12) % int(rng.integers(2, 4))
    known = rng.choice(12, size=remove or int(rng.integers(1, 11)), replace=False)
    budgets = []
    for k in range(int(rng.integers(1, 3))):
        weight = rng.integers(k, 12, size=3)[sort] + (k == 0)
        least = max(1, int(weight[known].sum()) - int(rng.integers(0, 4)))
        budgets.append(Budget(f"budget {k}", tuple(weight.tolist()), least, int(weight.sum())))
    return bs.RemovalProblem(random_hessian(kind, 12, rng), remove, budgets=budgets)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**9),
    kind=st.sampled_from(["psd", "indefinite", "low rank", "whole numbers"]),
    remove=st.sampled_from([None, 3, 7]),
    beaten=st.integers(0, 60),
)
def test_every_low_removal_lies_below_one_root(seed: int, kind: str, remove: int | None, beaten: int) -> None:
    """Against all subsets: what lies below the energy to beat is in one root, not below its bound, and not excluded."""
    problem = problem_of_sorts(seed, kind, remove)
    subsets = [np.array(row) for row in itertools.product([False, True], repeat=12)]
    allowed = [row for row in subsets if problem.allows(np.flatnonzero(row).tolist())]
    energies = [problem.energy(np.flatnonzero(row).tolist()) - problem.reduced.constant for row in allowed]
    cut = sorted(energies)[min(beaten, len(energies) - 1)]

    terms = terms_of(problem.reduced, problem.resolution)
    split, roots = open_roots(terms, convex_shift(*terms[:7]), cut, Stop(None))
    assert split.exactly
    for row, energy in zip(allowed, energies, strict=True):
        x = row[problem.reduced.block]
        inside = [
            root for root in roots if np.array_equal(np.bincount(split.group[x], minlength=len(root.quota)), root.quota)
        ]
        assert len(inside) <= 1
        if energy < cut - problem.resolution:
            (root,) = inside
            assert np.all((root.assignment == FREE) | (root.assignment == x))
            assert root.bound <= energy


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**9),
    kind=st.sampled_from(["psd", "indefinite", "low rank", "whole numbers", "equal"]),
    remove=st.sampled_from([None, 5]),
    states=st.integers(1, 60),
)
def test_budgets_on_sorts_equal_plain_enumeration(seed: int, kind: str, remove: int | None, states: int) -> None:
    problem = problem_of_sorts(seed, kind, remove)
    spectrum = bs.solve(problem, states=states, solver="exact")
    truth = all_energies(problem)[:states]
    check_contract(problem, spectrum)
    assert [s.energy for s in spectrum.states] == pytest.approx(truth, abs=1e-9)
    assert spectrum.num_proven == len(truth)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("solver", ["exact", "enumerate", "tabu"])
def test_the_scale_of_the_hessian_does_not_matter(solver: str, scale: float) -> None:
    h = random_hessian("psd", 14, np.random.default_rng(0))
    plain = bs.solve(bs.RemovalProblem(h, remove=6), states=25, solver=solver)
    scaled = bs.solve(bs.RemovalProblem(h * scale, remove=6), states=25, solver=solver)
    assert [s.removed for s in scaled.states] == [s.removed for s in plain.states]
    assert scaled.num_proven == plain.num_proven == (0 if solver == "tabu" else 25)


@pytest.mark.parametrize("solver", OWN)
@pytest.mark.parametrize("h", [np.zeros((24, 24)), np.ones((24, 24)), -np.ones((24, 24))])
def test_hessians_without_any_preference(solver: str, h: np.ndarray) -> None:
    problem = bs.RemovalProblem(h, remove=8)
    spectrum = bs.solve(problem, states=10, solver=solver)
    check_contract(problem, spectrum)
    assert {state.energy for state in spectrum.states} == {64.0 * h[0, 0]}
    assert len(spectrum.states) == 10
    assert spectrum.num_proven == (10 if solver in PROVING else 0)


@pytest.mark.parametrize("solver", OWN)
@pytest.mark.parametrize(("n", "remove"), [(2, 1), (9, 8), (9, 1)])
def test_fewest_and_most_removals(solver: str, n: int, remove: int) -> None:
    problem = bs.RemovalProblem(random_hessian("psd", n, np.random.default_rng(n)), remove=remove)
    spectrum = bs.solve(problem, states=100, solver=solver)
    check_contract(problem, spectrum)
    assert [s.energy for s in spectrum.states] == pytest.approx(all_energies(problem))


def test_a_single_allowed_removal_needs_no_solver() -> None:
    spectrum = bs.solve(bs.RemovalProblem(np.eye(4), remove=2, protect=[0, 2]), solver="exact")
    assert [s.removed for s in spectrum.states] == [(1, 3)]
    assert spectrum.num_proven == 1


def test_ties_at_the_last_level_are_proven_too() -> None:
    h = np.diag([0.0, 1, 1, 1, 1, 1, 1, 1, 1, 5, 5, 5])  # 0 and one of eight equal ones: eight ground states
    for states in (1, 3, 8, 9):
        spectrum = bs.solve(bs.RemovalProblem(h, remove=2), states=states, solver="exact")
        assert [s.energy for s in spectrum.states] == [1.0] * min(states, 8) + [2.0] * max(0, states - 8)
        assert spectrum.num_proven == states


@pytest.mark.parametrize("kind", ["psd", "indefinite", "low rank"])
def test_exact_equals_enumeration_on_millions_of_removals(kind: str) -> None:
    problem = bs.RemovalProblem(random_hessian(kind, 28, np.random.default_rng(8)), remove=8)
    exact = bs.solve(problem, states=100, solver="exact")
    everything = bs.solve(problem, states=100, solver="enumerate")
    assert exact.num_proven == everything.num_proven == 100
    assert [s.energy for s in exact.states] == pytest.approx([s.energy for s in everything.states], rel=1e-12)


def structured(n: int, rng: np.random.Generator) -> np.ndarray:
    a = (rng.normal(size=(500, n)) + 1.5 * rng.normal(size=(500, 1))) * np.exp(-3 * np.arange(n) / n)
    return a.T @ a / 500


def flat(n: int, seed: int = 0) -> np.ndarray:
    a = np.random.default_rng(seed).normal(size=(1000, n))
    return a.T @ a / 1000


def test_eighty_blocks_are_certified_and_tabu_finds_the_same() -> None:
    problem = bs.RemovalProblem(structured(80, np.random.default_rng(0)), remove=40)
    spectrum = bs.solve(problem, states=100)
    assert (spectrum.solver, spectrum.num_proven) == ("exact", 100)
    found = {s.removed for s in bs.solve(problem, states=100, solver="tabu").states}
    assert len(found & {s.removed for s in spectrum.states}) >= 95


@pytest.mark.parametrize("remove", [None, 8])
@pytest.mark.parametrize("kind", ["psd", "indefinite"])
def test_budgets_on_hundreds_of_thousands_of_subsets(kind: str, remove: int | None) -> None:
    """Attention and MLP in turns: a budget of parameters, which all have, and one of cache, of attention alone."""
    n = 18
    sizes, cache = tuple([4, 11] * (n // 2)), tuple([10, 0] * (n // 2))
    budgets = [Budget("parameters", sizes, 50, sum(sizes)), Budget("cache", cache, 31, sum(cache))]
    problem = bs.RemovalProblem(random_hessian(kind, n, np.random.default_rng(3)), remove, budgets=budgets)
    exact = bs.solve(problem, states=50, solver="exact")
    everything = bs.solve(problem, states=50, solver="enumerate")
    assert exact.num_proven == everything.num_proven == 50
    assert [s.energy for s in exact.states] == pytest.approx([s.energy for s in everything.states], rel=1e-12)
    for solver in ("tabu", "anneal"):
        assert bs.solve(problem, states=5, solver=solver).states[0].energy == pytest.approx(exact.states[0].energy)


def test_a_time_limit_returns_a_valid_bound() -> None:
    small = bs.RemovalProblem(flat(30), remove=12)
    truth = bs.solve(small, states=5, solver="enumerate").states
    cut_short = bs.solve(small, states=5, solver="exact", time_limit=0.02)
    check_contract(small, cut_short)
    assert cut_short.lower_bound <= truth[0].energy
    assert cut_short.states[: cut_short.num_proven] == truth[: cut_short.num_proven]
    large = bs.solve(bs.RemovalProblem(flat(120), remove=40), states=5, solver="exact", time_limit=6.0)
    assert large.statistics["stopped"] == "time limit"
    assert large.num_proven == 0
    assert 0 < large.lower_bound < large.states[0].energy
    assert large.gap == large.states[0].energy - large.lower_bound


@pytest.mark.parametrize(("solver", "n"), [("exact", 80), ("enumerate", 40), ("anneal", 200), ("tabu", 200)])
def test_ctrl_c_returns_the_best_found(solver: str, n: int) -> None:
    problem = bs.RemovalProblem(flat(n), remove=20)
    bs.solve(bs.RemovalProblem(flat(12), remove=4), solver=solver)  # compiled before the clock starts
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    spectrum = bs.solve(problem, states=3, solver=solver, time_limit=1000.0)
    timer.join()
    check_contract(problem, spectrum)
    assert spectrum.statistics["stopped"] == "interrupted"
    assert spectrum.num_proven == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_enumerate_refuses_what_would_take_too_long() -> None:
    with pytest.raises(ValueError, match=r"1\.08e\+23 removals.* s; take the solver 'exact'"):
        bs.solve(bs.RemovalProblem(np.eye(80), remove=40), solver="enumerate")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "magic"}, "auto or one of exact, enumerate, tabu"),
        ({"states": 0}, "at least 1"),
        ({"states": 1.5}, "whole number"),
        ({"time_limit": 0}, "positive"),
        ({"time_limit": math.nan}, "positive"),
    ],
)
def test_mistakes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bs.solve(bs.RemovalProblem(np.eye(4), remove=2), **arguments)


def test_auto_says_what_it_chose() -> None:
    spectrum = bs.solve(bs.RemovalProblem(np.eye(10), remove=3))
    assert spectrum.statistics["chosen"] == "enumerate, for 120 candidates"
    assert "enumerate, for 120 candidates" in spectrum.summary()


def test_a_spectrum_is_one_line_in_a_notebook() -> None:
    spectrum = bs.solve(bs.RemovalProblem(np.diag([3.0, 1.0, 2.0, 4.0, 5.0]), remove=2), states=3)
    assert repr(spectrum) == "Spectrum(3 states, 3 of them proven; CBO:0 removes 1-2, energy 3)"


@pytest.mark.parametrize("solver", ["exact", "tabu"])
def test_spectra_survive_files(solver: str, tmp_path: Path) -> None:
    spectrum = bs.solve(bs.RemovalProblem(flat(12), remove=4), solver=solver)
    spectrum.save(tmp_path / "spectrum.json")
    assert bs.Spectrum.load(tmp_path / "spectrum.json") == spectrum
    assert json.loads((tmp_path / "spectrum.json").read_text())["states"][0]["removed"]
    assert [path.name for path in tmp_path.iterdir()] == ["spectrum.json"]
    lines = spectrum.render(limit=3).splitlines()
    assert lines[1].split()[0] == "CBO:0"
    assert lines[4] == "... and 17 more states"
    (tmp_path / "broken.json").write_text(spectrum.to_json()[:100])
    with pytest.raises(ValueError, match="not a spectrum"):
        bs.Spectrum.load(tmp_path / "broken.json")


def test_solving_needs_no_model_code() -> None:
    code = "import sys, blockspin.solvers, blockspin.problem; print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.slow
def test_kernels_are_compiled_once_and_again_when_a_source_changes(tmp_path: Path) -> None:
    code = """
import numpy as np, blockspin as bs, importlib
for solver in ("exact", "enumerate", "tabu", "anneal"):
    bs.solve(bs.RemovalProblem(np.eye(12), remove=4), solver=solver)
names = ("moves", "node", "tree", "tabu", "enumerate", "anneal")
modules = [importlib.import_module("blockspin.solvers." + name) for name in names]
kernels = {id(v): v for m in modules for v in vars(m).values() if hasattr(v, "stats")}.values()
print(sum(sum(k.stats.cache_misses.values()) for k in kernels), sum(sum(k.stats.cache_hits.values()) for k in kernels))
"""
    package = tmp_path / "blockspin"
    shutil.copytree(Path(bs.__file__).parent, package, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def misses_and_hits() -> list[int]:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        return [int(number) for number in run.stdout.split()]

    assert misses_and_hits()[0] > 0
    misses, hits = misses_and_hits()
    assert misses == 0
    assert hits > 0
    # A kernel may call another file's, so a change of any file makes all of them old.
    with (package / "solvers" / "moves.py").open("a") as file:
        file.write("# changed\n")
    misses, hits = misses_and_hits()
    assert misses > 0
    assert hits == 0


def test_what_gurobi_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that stands for one without a licence."""

    class GurobiError(Exception):
        pass

    def refuse(**options: object) -> None:
        raise GurobiError("Model too large for size-limited license")

    monkeypatch.setitem(sys.modules, "gurobipy", SimpleNamespace(GurobiError=GurobiError, Env=refuse))
    with pytest.raises(ValueError, match=r"solver='gurobi' failed \(Model too large .*\(--solver\)"):
        bs.solve(bs.RemovalProblem(np.eye(4), 2), solver="gurobi")
