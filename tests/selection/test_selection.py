"""The selection on a tiny model where every removal can be measured: races, refits, polishing, resuming."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import random_samples
from numpy.typing import NDArray

from blockspin import baselines
from blockspin.energies.fitted import Fitted
from blockspin.energies.removals import gauss_newton
from blockspin.files import write_json
from blockspin.model.passes import passes_of_walk
from blockspin.model.quality import measured, shared_qualities
from blockspin.model.tracing import trace_model
from blockspin.problem import Block, Removal, RemovalProblem
from blockspin.selection.expectation import expectation
from blockspin.selection.ledger import Ledger
from blockspin.selection.pool import cheap_choices, pool_of
from blockspin.selection.race import race
from blockspin.selection.refit import refit
from blockspin.selection.result import Selection
from blockspin.selection.select import expected_best, run_selection, select
from blockspin.solvers import solve
from blockspin.solvers.candidates import Candidate, distinct, states_as_candidates, swaps

LAYERS = 8
SAMPLES = random_samples((10,) * 16)
EVERY = list(combinations(range(LAYERS), 3))


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:
            scale = float(torch.rand(1, generator=generator)) * 16 + 2
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(scale)
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def divergences(model: tf.PreTrainedModel) -> dict[tuple[int, ...], float]:
    return dict(zip(EVERY, (q.kl for q in shared_qualities(trace_model(model), EVERY, SAMPLES)), strict=True))


def problem_of(model: tf.PreTrainedModel) -> RemovalProblem:
    found = gauss_newton(model, SAMPLES[:4], progress=False)
    return RemovalProblem(found.hessian, 3, blocks=found.blocks)


def test_a_race_finds_the_best_and_spends_little_on_the_hopeless(
    model: tf.PreTrainedModel, divergences: dict[tuple[int, ...], float]
) -> None:
    book = Ledger(model, SAMPLES)
    race(book, EVERY)
    assert book.best() == min(divergences, key=divergences.__getitem__)
    assert book.mean(book.best()) == pytest.approx(min(divergences.values()), rel=1e-4)
    full = [removed for removed, values in book.values.items() if len(values) == len(SAMPLES)]
    assert 2 <= len(full) < len(EVERY) / 4
    assert len(book.values[max(divergences, key=divergences.__getitem__)]) == 2
    assert book.passes < 0.5 * passes_of_walk([(), *EVERY], LAYERS)


def test_differences_are_paired(model: tf.PreTrainedModel) -> None:
    book = Ledger(model, SAMPLES)
    book.extend([EVERY[0]], 16)
    book.extend([EVERY[5]], 8)
    mean, error = book.difference(EVERY[5], EVERY[0])
    apart = book.values[EVERY[5]] - book.values[EVERY[0]][:8]
    assert mean == pytest.approx(apart.mean())
    assert error == pytest.approx(apart.std(ddof=1) / np.sqrt(8))
    book.extend([EVERY[5]], 16)
    fresh = Ledger(model, SAMPLES)
    fresh.extend([EVERY[5]], 16)
    np.testing.assert_allclose(book.values[EVERY[5]], fresh.values[EVERY[5]], rtol=1e-4)


@pytest.mark.parametrize(("misleading", "budget"), [(False, 4), (True, 8)])
def test_polishing_finds_the_best_of_all_removals(
    model: tf.PreTrainedModel,
    divergences: dict[tuple[int, ...], float],
    misleading: bool,
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also from an energy that says the opposite of the truth."""
    monkeypatch.setattr("blockspin.selection.polish.PROPOSALS", 8)  # of 56 removals
    problem = problem_of(model)
    if misleading:
        problem = problem.with_energy(-problem.hessian)
    pool = states_as_candidates(solve(problem, states=4))
    found = run_selection(model, pool, SAMPLES, problem=problem, budget=budget, progress=False)
    lowest = found.trials[0]
    assert lowest.removed == min(divergences, key=divergences.__getitem__)
    assert lowest.loss == pytest.approx(min(divergences.values()), rel=1e-4)
    assert len(found.trials) < len(EVERY)
    assert [trial.above for trial in found.trials if trial.removed == found.chosen.removed] == [0.0]

    # What is chosen is as good as the lowest measured one, as far as the samples can tell.
    assert lowest.above_error is not None
    assert found.chosen.loss is not None
    assert found.chosen.loss - lowest.loss <= 2 * lowest.above_error


def test_a_refit_reproduces_a_quadratic_form() -> None:
    """Where the truth is a quadratic form, measuring most removals of four blocks predicts the others."""
    generator = np.random.default_rng(0)
    half = generator.normal(size=(6, 6))
    truth = RemovalProblem(half + half.T, 3)
    removals: list[Removal] = list(combinations(range(6), 3))

    class Book(Ledger):
        """Holds the truth of some removals; no model is run."""

        def __init__(self) -> None:
            self.values = {removed: np.array([truth.energy(removed)]) for removed in removals[:17]}

        def best(self) -> tuple[int, ...]:
            return min(self.values, key=lambda removed: self.values[removed][0])

        logarithmic = False

        def change(self, removed: tuple[int, ...], reference: tuple[int, ...]) -> tuple[float, float]:
            return float(self.values[removed][0] - self.values[reference][0]), 0.0

    start = truth.with_energy(np.eye(6))
    fitted = refit(Book(), start)
    measured = [fitted.energy(removed) for removed in removals[:17]]
    offset = np.mean(measured) - np.mean([truth.energy(removed) for removed in removals[:17]])
    for removed in removals[:17]:
        assert fitted.energy(removed) - offset == pytest.approx(truth.energy(removed), abs=0.05)
    spread = np.std([truth.energy(removed) for removed in removals])
    for removed in removals[17:]:
        assert abs(fitted.energy(removed) - offset - truth.energy(removed)) < spread


def test_the_luckiest_measurement_is_not_chosen() -> None:
    """Of removals with a quadratic truth and noisy values, the expected best is better than the lowest value."""
    generator = np.random.default_rng(0)
    removals = list(combinations(range(8), 4))
    regrets = []
    for _ in range(20):
        half = 0.1 * generator.normal(size=(8, 8))
        truth = RemovalProblem(half + half.T, 4)
        base = np.array([truth.energy(removed) for removed in removals])
        noise = generator.normal(size=(len(removals), 16))  # of each sample

        book = object.__new__(Ledger)
        book.values = dict(zip(removals, base[:, None] + noise, strict=True))
        book.weights, book.logarithmic = np.ones(16), False
        expected = expected_best(book, truth.with_energy(np.eye(8)))
        regrets.append([truth.energy(expected), truth.energy(book.best()), base.min()])
    of_expected, of_lowest, of_best = np.mean(regrets, axis=0)
    assert of_expected - of_best < 0.7 * (of_lowest - of_best)


class Told(Ledger):
    """Shows as many values of each removal as are asked for; no model is run."""

    def __init__(self, truth: dict[Removal, NDArray[np.float64]]) -> None:
        self.truth, self.values = truth, {}
        self.weights, self.logarithmic = np.ones(16), True

    def extend(self, removals: Sequence[Removal], number: int) -> None:
        for removed in removals:
            self.values[removed] = self.truth[removed][: max(number, len(self.values.get(removed, ())))]

    def num_values(self) -> int:
        return sum(map(len, self.values.values()))


def test_a_form_of_known_misfit_makes_a_race_surer() -> None:
    """Its survivors are closer to the best of all, at about the same cost."""
    generator = np.random.default_rng(3)
    removals: list[Removal] = list(combinations(range(8), 2))
    rows = np.array([np.isin(range(8), removed) for removed in removals])
    regrets, costs = [], []
    for _ in range(60):
        half = 0.02 * generator.normal(size=(8, 8))
        form = RemovalProblem(half + half.T, 2)
        base = form.energies(rows) + 0.03 * generator.normal(size=len(rows))  # the logarithms
        noise = np.exp(base[:, None] + 0.1 * generator.normal(size=(len(rows), 16)))

        books = [Told(dict(zip(removals, noise, strict=True))) for _ in range(2)]
        race(books[0], removals)
        race(books[1], removals, form)
        chosen = []
        for book, known in zip(books, (None, form), strict=True):
            last = book.complete()
            chosen.append(last[expectation(book, last, known).ranked()[0]])
        regrets.append([base[removals.index(removed)] - base.min() for removed in chosen])
        costs.append([book.num_values() for book in books])

    plain, formed = np.mean(regrets, axis=0)
    assert formed < 0.7 * plain
    assert np.mean(costs, axis=0)[1] < 1.2 * np.mean(costs, axis=0)[0]


def test_values_that_agree_by_chance_are_not_certain() -> None:
    """On two samples each the errors that are expected are those of all removals, not the luckiest one's own."""
    generator = np.random.default_rng(0)
    removals = [(k,) for k in range(40)]
    book = Told({removed: np.exp(0.2 * generator.normal(size=16)) for removed in removals})
    book.extend(removals, 2)
    errors = expectation(book, removals, None).errors
    own = [book.change(removed, book.best())[1] for removed in removals if removed != book.best()]
    assert min(own) < 0.02
    assert errors.min() > 0.05
    assert np.mean(errors) == pytest.approx(0.2 / np.sqrt(2), rel=0.3)


def test_fitted_energies_and_the_selections_measurements_are_one_body() -> None:
    """What energies have seen of the low states counts as much as what the selection sees of them."""
    generator = np.random.default_rng(1)
    removals = list(combinations(range(8), 4))
    rows = np.array([np.isin(range(8), removed) for removed in removals])
    blocks = tuple(Block(i, "attention+mlp", 1) for i in range(8))
    with_both, alone = [], []
    for _ in range(20):
        half = 0.05 * generator.normal(size=(8, 8))
        truth = RemovalProblem(half + half.T, 4)
        base = truth.energies(rows)

        # Eight samples each, on which the logarithm of every divergence scatters.
        seen, to_see = np.exp(base[:, None] + 0.3 * generator.normal(size=(2, len(rows), 8)))
        fitted = Fitted(
            removed=np.repeat(rows, 8, axis=0).astype(np.uint8),
            sample=np.tile(np.arange(8, dtype=np.uint32), len(rows)),
            divergence=seen.ravel(),
            singles=np.ones(8),
            blocks=blocks,
        )
        book = object.__new__(Ledger)
        book.values = dict(zip(removals, to_see, strict=True))
        book.weights, book.logarithmic = np.ones(8), True
        problem = truth.with_energy(fitted.hessian)
        with_both.append(truth.energy(expected_best(book, problem, fitted=fitted)) - base.min())
        alone.append(truth.energy(book.best()) - base.min())
    assert np.mean(with_both) < 0.6 * np.mean(alone)


def test_changes_of_divergences_are_logarithmic(model: tf.PreTrainedModel) -> None:
    book = Ledger(model, SAMPLES)
    book.extend([(0, 1, 2), (3, 4, 5)], 16)
    book.extend([(1, 2, 3)], 1)
    change, error = book.change((0, 1, 2), (3, 4, 5))
    first, second = book.values[0, 1, 2], book.values[3, 4, 5]
    assert change == pytest.approx(np.log(first.mean() / second.mean()))

    generator = np.random.default_rng(0)
    rows = generator.integers(0, 16, (2000, 16))  # the bootstrap
    scatter = np.log(first[rows].mean(axis=1) / second[rows].mean(axis=1)).std()
    assert error == pytest.approx(scatter, rel=0.25)
    assert book.change((1, 2, 3), (3, 4, 5))[1] == np.inf

    losses = Ledger(model, SAMPLES, "loss")
    losses.extend([(0, 1, 2), (3, 4, 5)], 16)
    assert losses.change((0, 1, 2), (3, 4, 5)) == losses.difference((0, 1, 2), (3, 4, 5))


def test_the_outcome_is_not_worse_than_any_cheap_baseline(
    model: tf.PreTrainedModel, divergences: dict[tuple[int, ...], float]
) -> None:
    problem = problem_of(model)
    activations = baselines.measure_activations(model, SAMPLES)
    cheap = cheap_choices(problem, activations)
    pool = pool_of(problem, solve(problem, states=30), cheap, ground_states=[(0, 1, 2)])
    removals = {candidate.removed for candidate in pool}
    assert len(removals) == len(pool)
    methods = [baselines.block_influence, baselines.norm_ratio, baselines.angular_distance]
    choices = {method(problem, activations).removed for method in methods} | {(5, 6, 7)}
    assert choices | {(0, 1, 2)} <= removals
    always = [candidate.removed for candidate in cheap]
    found = run_selection(model, pool, SAMPLES, always=always, budget=0, progress=False)
    assert found.chosen.loss is not None
    assert found.chosen.loss <= min(divergences[removed] for removed in choices) + 1e-6


def test_distinct_states_are_more_than_one_exchange_apart() -> None:
    states = [Candidate(removed, "s") for removed in ((0, 1, 2), (0, 1, 3), (0, 4, 5), (0, 1, 2, 6), (4, 5, 6))]
    assert [c.removed for c in distinct(states)] == [(0, 1, 2), (0, 4, 5)]
    assert distinct(states, apart=0) == states


def test_swaps_are_all_allowed_exchanges_of_one_block() -> None:
    blocks = [Block(i, "even" if i % 2 == 0 else "odd", 1) for i in range(6)]
    problem = RemovalProblem(np.diag(np.arange(6.0)), {"even": 1, "odd": 1}, blocks=blocks, protect=(5,))
    assert swaps(problem, (2, 3)) == [(0, 3), (1, 2), (3, 4)]


def test_a_users_objective_decides(model: tf.PreTrainedModel) -> None:
    """A function of the shortened model gives the same choice as the same objective by its name."""
    with torch.no_grad():
        whole = [model(sample[None]).logits[0, :-1].log_softmax(-1) for sample in SAMPLES]

    def divergence(shortened: torch.nn.Module) -> float:
        with torch.no_grad():
            logs = [shortened(sample[None]).logits[0, :-1].log_softmax(-1) for sample in SAMPLES]
        return float(sum((p.exp() * (p - q)).sum(-1).mean() for p, q in zip(whole, logs, strict=True))) / len(SAMPLES)

    pool = [Candidate(removed, "any") for removed in EVERY[::5]]
    by_function = select(model, pool, SAMPLES, objective=divergence, progress=False)
    by_name = select(model, pool, SAMPLES, progress=False)
    assert by_function.removed == by_name.removed
    assert by_function.loss == pytest.approx(by_name.loss, rel=1e-4)


def test_an_interrupted_selection_continues_and_ends_the_same(
    model: tf.PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, path = problem_of(model), tmp_path / "partial.jsonl"
    pool = states_as_candidates(solve(problem, states=6))
    unbroken = run_selection(model, pool, SAMPLES, problem=problem, budget=15, progress=False)
    calls: list[object] = []

    def counting(*arguments: Any, **options: Any) -> NDArray[np.float64]:
        calls.append(arguments[1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(*arguments, **options)

    monkeypatch.setattr("blockspin.model.known.measured", counting)
    with pytest.raises(KeyboardInterrupt):
        run_selection(model, pool, SAMPLES, problem=problem, budget=15, partial=path, progress=False)
    before = len(calls)
    again = run_selection(model, pool, SAMPLES, problem=problem, budget=15, partial=path, progress=False)
    assert (again.chosen, again.passes) == (unbroken.chosen, unbroken.passes)
    assert [t.removed for t in again.trials] == [t.removed for t in unbroken.trials]
    done = len(calls)
    run_selection(model, pool, SAMPLES, problem=problem, budget=15, partial=path, progress=False)
    assert len(calls) == done > before
    with pytest.raises(ValueError, match="other settings"):
        run_selection(model, pool, SAMPLES, objective="loss", partial=path, progress=False)


def test_a_budget_that_was_not_kept_is_told(model: tf.PreTrainedModel, tmp_path: Path) -> None:
    """A round that began within the budget is finished; without a polish there is no budget."""
    problem = problem_of(model)
    pool = states_as_candidates(solve(problem, states=6))
    for budget, told in ((0.5, True), (1000.0, False)):
        found = run_selection(model, pool, SAMPLES, problem=problem, budget=budget, progress=False)
        assert (found.passes > budget) == told
        assert ("where the budget was 0.5" in found.summary()) == told
        write_json(tmp_path / "candidates.json", found.as_json())
        assert Selection.load(tmp_path / "candidates.json") == found
    assert "budget" not in run_selection(model, pool, SAMPLES, budget=0.5, progress=False).summary()


def test_constraints_hold_for_all_that_is_tried(model: tf.PreTrainedModel) -> None:
    blocks = [Block(i, "even" if i % 2 == 0 else "odd", 10 + i) for i in range(LAYERS)]
    for goal in ({"remove": {"even": 1, "odd": 1}, "protect": (1,)}, {"remove_parameters": 0.3}):
        problem = RemovalProblem(np.eye(LAYERS), blocks=blocks, **goal)
        pool = pool_of(problem, solve(problem, states=5))
        found = run_selection(model, pool, SAMPLES[:4], problem=problem, budget=10, progress=False)
        assert all(problem.allows(trial.removed) for trial in found.trials)


def test_mistakes_are_refused(model: tf.PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="no candidates"):
        select(model, [], SAMPLES)
    unknown: Any = "speed"
    with pytest.raises(ValueError, match="--objective"):
        select(model, [Candidate((0,), "any")], SAMPLES, objective=unknown)
    with pytest.raises(ValueError, match="finite"):
        select(model, [Candidate((0,), "any")], SAMPLES, objective=lambda m: float("nan"), progress=False)
