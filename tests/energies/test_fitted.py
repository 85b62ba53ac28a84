"""Energies fitted to measured removals: the fit against planted forms and the textbook formula, the measuring against
models built without the blocks, goals, files, resuming and errors."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, random_samples, tiny_model
from numpy.typing import NDArray

from blockspin.comparison.figures import spearman
from blockspin.energies import estimate_energies, load_energies
from blockspin.energies.design import CHECKED, any_number, problems_for, random_removals, unmeasured_lowest
from blockspin.energies.fitted import Fitted, fit_removals
from blockspin.energies.measurements import SINGLES_SAMPLES, Measurements
from blockspin.energies.quadratic import RATIOS, fit_quadratic, resemblance
from blockspin.model.passes import passes_of_walk
from blockspin.model.quality import measured
from blockspin.problem import Block, Budget, Removal, RemovalProblem
from blockspin.solvers import solve
from blockspin.surgery.memory import remove_blocks

SAMPLES = random_samples((9, 5, 12, 7))
PASSES = 144.0


def six_blocks() -> tf.PreTrainedModel:
    """A random Llama of six blocks that do something."""
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4
    )
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4.0)
    return model


class Known(Measurements):
    """Nothing but the removals that were measured."""

    def __init__(self, removals: list[Removal]) -> None:
        self.removals = removals


def every_removal(num_blocks: int, sizes: range) -> NDArray[np.bool_]:
    """(number of removals, num_blocks): all removals of some sizes."""
    rows = [np.isin(range(num_blocks), blocks) for size in sizes for blocks in combinations(range(num_blocks), size)]
    return np.array(rows)


def planted_form(num_blocks: int, seed: int = 0) -> NDArray[np.float64]:
    form = np.random.default_rng(seed).normal(size=(num_blocks, num_blocks))
    return form + form.T


def values_of(form: NDArray[np.float64], removed: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.array([form[np.ix_(row, row)].sum() for row in removed])


def divergences(model: tf.PreTrainedModel, removed: tuple[int, ...]) -> list[float]:
    """KL from the whole model of a model built without some blocks: token mean on each sample."""
    smaller, found = remove_blocks(model, removed), []
    with torch.no_grad():
        for sample in SAMPLES:
            p, q = (m(sample[None], use_cache=False).logits[0, :-1].log_softmax(-1) for m in (model, smaller))
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def test_a_planted_form_is_recovered() -> None:
    removed = every_removal(7, range(1, 5))
    form = planted_form(7)
    found = fit_quadratic(removed, 3 + values_of(form, removed), np.ones((len(removed), 1)), ratio=1e9)
    np.testing.assert_allclose(found.matrix, form, atol=1e-3)
    assert found.coefficients == pytest.approx([3], abs=1e-3)


def test_the_fit_is_the_mean_of_the_gaussian_process() -> None:
    """Against the formula with the basis as further random coefficients of very large variance."""
    generator = np.random.default_rng(0)
    removed, unseen = generator.random((2, 25, 8)) < 0.4
    values, noise = generator.normal(size=25), generator.uniform(0.5, 2, 25)
    basis = np.column_stack([np.ones(25), removed.sum(axis=1)])
    found = fit_quadratic(removed, values, basis, noise=noise, ratio=3.0)

    def kernel(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> NDArray[np.float64]:
        n = a.astype(float) @ resemblance(8) @ b.astype(float).T
        return np.asarray(n * (n + 1) / 2)

    scale = 3.0 / kernel(removed, removed).diagonal().mean()
    covariance = scale * kernel(removed, removed) + 1e6 * basis @ basis.T + np.diag(noise / noise.mean())
    others = np.column_stack([np.ones(25), unseen.sum(axis=1)])
    expected = (scale * kernel(unseen, removed) + 1e6 * others @ basis.T) @ np.linalg.solve(covariance, values)
    np.testing.assert_allclose(others @ found.coefficients + values_of(found.matrix, unseen), expected, atol=1e-4)


def test_the_ratio_tells_a_form_from_noise() -> None:
    removed = every_removal(8, range(2, 5))
    generator = np.random.default_rng(1)
    constant = np.ones((len(removed), 1))
    of_form = values_of(planted_form(8), removed)
    noise = generator.normal(size=len(removed))
    assert fit_quadratic(removed, of_form, constant).ratio == RATIOS[-1]
    assert fit_quadratic(removed, noise, constant).ratio < 0.3
    assert 0.3 < fit_quadratic(removed, of_form / of_form.std() + noise, constant).ratio < 10


def test_blocks_of_different_kinds_do_not_resemble_each_other() -> None:
    blocks = [Block(i, kind, 1) for i, kind in enumerate(("mamba", "moe", "mamba", "moe"))]
    alike = resemblance(4, blocks)
    assert alike[0, 1] == alike[1, 2] == 0 < alike[0, 2] < 1
    assert np.linalg.eigvalsh(alike).min() > 0


def test_what_is_special_about_a_sample_does_not_count() -> None:
    removed = every_removal(6, range(1, 4))
    sample = (np.arange(len(removed)) % 3).astype(np.uint32)
    values = np.exp(values_of(planted_form(6), removed) / 10)
    blocks = tuple(Block(i, "attention+mlp", 1) for i in range(6))
    singles = values[:6]
    rows = removed.astype(np.uint8)
    first = Fitted(rows, sample, values, singles, blocks)
    second = Fitted(rows, sample, values * np.array([1.0, 5.0, 0.2])[sample], singles, blocks)
    np.testing.assert_allclose(first.hessian, second.hessian, atol=1e-8)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return fit_removals(six_blocks(), SAMPLES, passes=PASSES, progress=False)


def test_the_divergences_are_those_of_models_without_the_blocks(fitted: Fitted) -> None:
    model = six_blocks()
    for row in range(0, len(fitted.sample), 17):
        removed = tuple(np.flatnonzero(fitted.removed[row]).tolist())
        expected = divergences(model, removed)[fitted.sample[row]]
        assert fitted.divergence[row] == pytest.approx(expected, rel=1e-3)
    for block in range(6):
        expected = np.mean(divergences(model, (block,))[:SINGLES_SAMPLES])
        assert fitted.singles[block] == pytest.approx(expected, rel=1e-3)


def test_it_costs_what_was_asked_for(fitted: Fitted) -> None:
    """Every sample is one walk in each of its turns, and the single removals are one on each of the first samples."""
    each = [(), *((block,) for block in range(6))]
    least = SINGLES_SAMPLES * passes_of_walk(each, 6)
    for sample in range(len(SAMPLES)):
        rows = [tuple(np.flatnonzero(row).tolist()) for row in fitted.removed[fitted.sample == sample]]
        least += passes_of_walk([(), *rows], 6)
    assert least <= PASSES + 1


def test_the_order_of_all_removals_is_that_of_their_divergences(fitted: Fitted) -> None:
    model = six_blocks()
    tokens = np.array([len(sample) - 1 for sample in SAMPLES])
    for size in (1, 2, 3):
        problem = RemovalProblem(fitted.hessian, size)
        removals = list(combinations(range(6), size))
        true = [np.average(divergences(model, removed), weights=tokens) for removed in removals]
        energies = [problem.energy(removed) for removed in removals]
        assert spearman(true, energies) > 0.8
        best = solve(problem, states=1).states[0].removed
        assert true[removals.index(best)] <= sorted(true)[len(true) // 5]


def test_an_interrupted_run_continues(tmp_path: Path, fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    model, partial = six_blocks(), tmp_path / "partial"
    whole = fit_removals(model, SAMPLES, passes=PASSES, partial=partial, progress=False)
    np.testing.assert_array_equal(whole.hessian, fitted.hessian)

    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:5])
    runs: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        runs.append(len(arguments[1]))
        return measured(*arguments, **options)

    monkeypatch.setattr("blockspin.model.known.measured", counted)
    again = fit_removals(model, SAMPLES, passes=PASSES, partial=partial, progress=False)
    np.testing.assert_array_equal(again.hessian, whole.hessian)
    assert len(runs) == len(lines) - len(lines) // 2

    with pytest.raises(ValueError, match="another model"):
        fit_removals(model, SAMPLES, passes=PASSES, seed=1, partial=partial, progress=False)


def test_only_removals_that_meet_the_goal_are_measured() -> None:
    model = six_blocks()
    found = fit_removals(model, SAMPLES, goal=2, protect=[0, 3], passes=PASSES, progress=False)
    assert (found.removed.sum(axis=1) == 2).all()
    assert not found.removed[:, [0, 3]].any()
    assert len(np.unique(found.removed, axis=0)) == 6  # of four blocks

    half = fit_removals(model, SAMPLES, goal=0.5, passes=PASSES, progress=False)
    assert (half.removed.sum(axis=1) >= 3).all()  # the blocks are equally large
    with pytest.raises(ValueError, match="only 3 of 6"):
        fit_removals(model, SAMPLES, goal=4, protect=[0, 1, 2], progress=False)


WEIGHTS = (1, 3, 2, 5, 4, 2)  # of the six blocks
BUDGET = Budget("--target-size 59%", WEIGHTS, least=7, total=17)


def just_enough(budget: Budget, least_blocks: int = 1) -> list[Removal]:
    """Every removal that meets a budget and no longer does with any of its blocks put back."""
    found: list[Removal] = []
    for size in range(least_blocks, len(budget.weight)):
        for removed in combinations(range(len(budget.weight)), size):
            gone = sum(budget.weight[i] for i in removed)
            if 0 <= gone - budget.least < min(budget.weight[i] for i in removed):
                found.append(removed)
    return found


def test_draws_meet_a_budget_without_a_block_to_spare() -> None:
    blocks = [Block(i, "attention+mlp", 1) for i in range(6)]
    singles = np.array([0.1, 0.2, 0.3, 0.2, 0.1, 0.2])
    problems = problems_for(blocks, singles, None, [], [BUDGET])
    drawn = islice(random_removals(problems, singles, np.random.default_rng(0)), 2000)
    assert {*drawn} == {*just_enough(BUDGET)}


def test_energies_for_a_budget_order_what_just_meets_it() -> None:
    model = six_blocks()
    found = fit_removals(model, SAMPLES, budgets=[BUDGET], passes=PASSES, progress=False)
    assert (found.removed @ np.array(WEIGHTS) >= BUDGET.least).all()

    tokens = [len(sample) - 1 for sample in SAMPLES]
    removals = just_enough(BUDGET)
    true = [float(np.average(divergences(model, removed), weights=tokens)) for removed in removals]
    problem = RemovalProblem(found.hessian, blocks=found.blocks, budgets=[BUDGET])
    assert spearman(true, [problem.energy(removed) for removed in removals]) > 0.8
    assert solve(problem, states=1).states[0].removed in removals

    with pytest.raises(ValueError, match="--target-size 59%: out of reach"):
        fit_removals(model, SAMPLES, budgets=[BUDGET], protect=[1, 3, 4], progress=False)


def test_energies_record_what_they_are_made_for(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    found = estimate_energies("fitted", six_blocks(), SAMPLES, goal=3, budgets=[BUDGET], partial=partial)
    assert found.metadata["goal"] == "3, --target-size 59%"
    assert isinstance(found, Fitted)
    assert (found.removed.sum(axis=1) == 3).all()

    other = replace(BUDGET, least=8)
    with pytest.raises(ValueError, match="another model"):
        estimate_energies("fitted", six_blocks(), SAMPLES, goal=3, budgets=[other], partial=partial)


def test_what_is_lowest_has_been_measured() -> None:
    """However few passes there are: nothing that contradicts nothing is left at the bottom."""
    model, goal = six_blocks(), 3
    found = fit_removals(model, SAMPLES, goal=goal, passes=60, progress=False)
    known = {tuple(np.flatnonzero(row).tolist()) for row in found.removed}
    lowest = solve(RemovalProblem(found.hessian, goal, blocks=found.blocks), states=CHECKED).states
    assert {state.removed for state in lowest} <= known


@pytest.mark.parametrize("passes", [60, PASSES])
def test_without_a_goal_deeper_removals_than_half_are_not_below_all(passes: int) -> None:
    """Budgets do not say how many blocks go: what the form prefers beyond the measured numbers must be measured."""
    found = fit_removals(six_blocks(), SAMPLES, passes=passes, progress=False)
    known = {tuple(np.flatnonzero(row).tolist()) for row in found.removed}
    half = Budget("half", (1,) * 6, 3, 6)
    (lowest,) = solve(RemovalProblem(found.hessian, blocks=found.blocks, budgets=[half]), states=1).states
    assert lowest.removed in known


def test_a_form_that_falls_beyond_half_of_the_blocks_is_found_out() -> None:
    blocks = [Block(i, "attention+mlp", 1) for i in range(6)]
    falling = np.eye(6) - 1 / 3  # k of the blocks cost k - k^2 / 3, which is least where one stays
    problem = any_number(blocks, np.ones(6), protect=[0, 5])
    assert unmeasured_lowest([problem], falling, Known([(1, 2, 3)]))[0] == (1, 2, 3, 4)


def test_states_that_were_not_measured_are_found() -> None:
    problem = RemovalProblem(planted_form(6), 3)
    lowest = [state.removed for state in solve(problem, states=CHECKED).states]
    known = Known([lowest[0], lowest[2]])
    assert unmeasured_lowest([problem], problem.hessian, known) == [lowest[1], lowest[3]]
    assert unmeasured_lowest([problem, problem], problem.hessian, known) == []  # of several, only the ground states


def test_further_measurements_are_fitted_like_the_first(fitted: Fitted) -> None:
    """Those of one sample, handed over later, give the form that all of them give at once."""
    last = fitted.sample == fitted.sample.max()
    first = replace(
        fitted, removed=fitted.removed[~last], sample=fitted.sample[~last], divergence=fitted.divergence[~last]
    )
    rows = fitted.removed[last].astype(np.bool_)
    together = first.extended(rows, fitted.divergence[last], np.ones(len(rows)))
    at_once = replace(fitted, divergence=np.concatenate([first.divergence, fitted.divergence[last]]))
    at_once = replace(
        at_once,
        removed=np.concatenate([first.removed, fitted.removed[last]]),
        sample=np.concatenate([first.sample, fitted.sample[last]]),
    )
    np.testing.assert_allclose(together.hessian, at_once.hessian, atol=1e-6 * np.abs(at_once.hessian).max())


def test_means_of_more_samples_weigh_more(fitted: Fitted) -> None:
    """A removal that is said to be far worse than it was: the more samples say so, the more it counts."""
    row, before = fitted.removed[:1].astype(np.bool_), fitted.divergence[:1]
    others = fitted.removed[5:15].astype(np.bool_)
    energies = []
    for number in (1.0, 100.0):
        values = np.concatenate([100 * before, fitted.divergence[5:15]])
        changed = fitted.extended(np.concatenate([row, others]), values, np.full(11, number))
        energies.append(values_of(changed.hessian, row)[0] - values_of(changed.hessian, others).mean())
    assert energies[1] > energies[0]


def test_the_file_holds_all(tmp_path: Path, fitted: Fitted) -> None:
    fitted.save(tmp_path / "energies.safetensors")
    again = load_energies(tmp_path / "energies.safetensors")
    assert isinstance(again, Fitted)
    np.testing.assert_array_equal(again.hessian, fitted.hessian)


def test_resampled_energies_scatter_around_the_fit(fitted: Fitted) -> None:
    generator = np.random.default_rng(0)
    replicates = [fitted.resampled(generator) for _ in range(5)]
    removed = every_removal(6, range(2, 3))
    whole = values_of(fitted.hessian, removed).tolist()
    for replicate in replicates:
        energies = values_of(replicate.hessian, removed).tolist()
        assert energies != whole
        assert spearman(energies, whole) > 0.7


def test_too_few_passes_are_refused() -> None:
    with pytest.raises(ValueError, match="give at least"):
        fit_removals(tiny_model("llama"), SAMPLES, passes=3, progress=False)


def test_the_bar_ends_where_the_measuring_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Four blocks have so few removals that most of the budget is left."""
    energies = fit_removals(tiny_model("llama"), SAMPLES, passes=500.0)
    measured_number = len(energies.divergence)
    assert repr(energies).startswith(f"Fitted(4 units, removed ({measured_number}, 4), sample ({measured_number},), ")
    steps = re.search(r"Removals .* (\d+)/(\d+) ", capsys.readouterr().err)
    assert steps is not None
    assert int(steps[1]) == int(steps[2]) < 500
