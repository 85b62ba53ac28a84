"""A method that does not fit into memory is left out of a comparison, with the reason, and the others go on."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blockspin.comparison.cost import MethodCost
from blockspin.comparison.methods import Case, Method
from blockspin.comparison.results import Comparison
from blockspin.comparison.run import run_method
from blockspin.memory import OutOfMemory
from blockspin.solvers.candidates import Candidate


def case() -> Any:
    setup = SimpleNamespace(counting=lambda: nullcontext(MethodCost()), removable=lambda removed: True)
    return SimpleNamespace(setup=setup, goal="1")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OutOfMemory("the gradients of the weights take 640 GiB, and the host has 24 GiB free"), "take 640 GiB"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "out of memory (CUDA out of memory",
        ),
        (MemoryError("Unable to allocate 3.2 TiB"), "out of memory (Unable to allocate"),
    ],
)
def test_what_does_not_fit_is_left_out(error: Exception, reason: str) -> None:
    def choose(case: Case) -> Candidate:
        raise error

    comparison = Comparison({})
    run_method(case(), Method("large", choose), comparison)
    run_method(case(), Method("small", lambda case: Candidate((1,), "", 0.5)), comparison)
    assert [choice.method for choice in comparison.choices] == ["small"]
    assert list(comparison.left_out) == ["large, 1"]
    assert reason in comparison.left_out["large, 1"]


def test_other_errors_are_not_hidden() -> None:
    def choose(case: Case) -> Candidate:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run_method(case(), Method("broken", choose), Comparison({}))
