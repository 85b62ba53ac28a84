"""Several processes on one run give what one gives, bit by bit, and can continue what others have begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_samples, tiny_model
from several import in_processes

from blockspin import baselines
from blockspin.config import ENERGY_NAMES
from blockspin.energies import estimate_energies
from blockspin.energies.energies import Energies
from blockspin.model.losses import losses_of
from blockspin.model.quality import quality_of
from blockspin.problem import RemovalProblem
from blockspin.selection.select import run_selection
from blockspin.solvers import solve
from blockspin.solvers.candidates import states_as_candidates

LENGTHS = (12, 9, 9, 7, 5)


def arrays_of(energies: Energies) -> dict[str, Any]:
    return {name: getattr(energies, name) for name in energies.shapes}


def measurements(names: tuple[str, ...]) -> dict[str, Any]:
    """What is measured on samples: in batches of two, of which there are three, and in one, where removals are shared.

    names: of the energies.
    """
    model, samples = tiny_model("llama"), random_samples(LENGTHS)
    found: dict[str, Any] = {}
    for name in names:
        energies = estimate_energies(name, model, samples, batch_size=2, progress=False)
        found |= {f"{name}, {array}": values for array, values in arrays_of(energies).items()}

    hessian = np.cov(np.random.default_rng(0).normal(size=(4, 12)))
    problem = RemovalProblem(hessian, 2)
    pool = states_as_candidates(solve(problem, states=6))
    for batch_size in (2, 8):
        selection = run_selection(
            model, pool, samples, problem=problem, budget=8, batch_size=batch_size, progress=False
        )
        found[f"trials, {batch_size}"] = [(trial.removed, trial.loss) for trial in selection.trials]

    found["losses"] = losses_of(model, samples, 2).numpy()
    found["quality"] = vars(quality_of(tiny_model("llama", seed=1), model, samples, 2))
    found |= vars(baselines.measure_activations(model, samples, batch_size=2))
    return found


@pytest.mark.parametrize(
    ("processes", "names"),
    [
        (2, ("secant",)),
        pytest.param(2, ENERGY_NAMES, marks=pytest.mark.slow),
        pytest.param(3, ENERGY_NAMES, marks=pytest.mark.slow),
    ],
)
def test_several_processes_measure_what_one_measures(processes: int, names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    expected = in_processes(1, tmp_path / "alone", measurements, names)[0]
    for found in in_processes(processes, tmp_path, measurements, names):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            if isinstance(values, np.ndarray):
                np.testing.assert_array_equal(found[name], values, err_msg=name)
            else:
                assert found[name] == values, name
