"""Ridge regression from sums, against the solution of the augmented rows."""

from __future__ import annotations

import pytest
import torch

from blockspin.repairs.least_squares import NormalEquations, place_of_sums


def test_the_normal_equations_are_those_of_augmented_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5000, 6, generator=generator) * torch.tensor([1, 10, 0.1, 1, 1, 3])  # more than one chunk
    missing, weights = torch.randn(5000, 3, generator=generator), torch.rand(5000, generator=generator)
    sums = NormalEquations(6, 3)
    sums.add(inputs[:100], missing[:100], weights[:100])
    sums.add(inputs[100:], missing[100:], weights[100:])
    solution = sums.solution(0.3)

    # The penalty is one more row for each input, with nothing missing.
    roots = weights.double().sqrt()[:, None]
    rows, sides = inputs.double() * roots, missing.double() * roots
    penalty = torch.diag((0.3 * rows.square().sum(0)).sqrt())
    expected = torch.linalg.lstsq(torch.cat([rows, penalty]), torch.cat([sides, torch.zeros(6, 3)])).solution
    torch.testing.assert_close(solution, expected, rtol=1e-4, atol=1e-6)
    assert sums.error(solution) == pytest.approx(float((sides - rows @ solution).square().sum()), rel=1e-4)
    assert sums.error() == pytest.approx(float(sides.square().sum()), rel=1e-4)


def test_inputs_that_are_zero_or_the_same_are_no_trouble() -> None:
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    sums = NormalEquations(3, 1)
    sums.add(torch.cat([x, x, torch.zeros(50, 1)], 1), 2 * x, torch.ones(50))
    torch.testing.assert_close(sums.solution(0.0), torch.tensor([[1.0], [1.0], [0.0]]).double(), rtol=1e-3, atol=1e-3)


def test_sums_that_do_not_fit_on_a_gpu_are_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("blockspin.repairs.least_squares.free_memory", lambda device: 20 * 2**30)
    assert place_of_sums(14336, 4096, gpu) == gpu
    assert place_of_sums(28672, 8192, gpu) == torch.device("cpu")
