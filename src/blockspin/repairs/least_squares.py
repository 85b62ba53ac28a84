"""Weighted ridge regression from sums over tokens: no activation is kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import free_memory

RIDGE = 0.3  # of each input's own square; see docs/repair.md
READING_RIDGE = 0.01  # the same for maps that read the stream
_CHUNK = 4096  # tokens multiplied at once
_COPIES = 5  # of the sums at a time: for fitting and held out, penalised, factored, and a chunk's


class NormalEquations:
    """The sums that the least-squares problem min_X sum_t w_t |inputs_t X - missing_t|^2 is made of.

    gram: (inputs, inputs), sum of w x x^T; cross: (inputs, outputs), sum of w x y^T; square: sum of w |y|^2.
    Tokens are multiplied a chunk at a time in float32, or wider where they are, and the chunks added in float64.

    device: where the tokens are, and where the sums are too if there is room.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        place = place_of_sums(inputs, outputs, torch.device(device))
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=place)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=place)
        self.square = 0.0
        self.tokens = 0

    def add(self, inputs: Tensor, missing: Tensor, weights: Tensor) -> None:
        """Count tokens in. inputs: (tokens, inputs); missing: (tokens, outputs); weights: (tokens,)."""
        for start in range(0, len(inputs), _CHUNK):
            x, y, w = (part[start : start + _CHUNK] for part in (inputs, missing, weights))
            wide = torch.promote_types(x.dtype, torch.float32)
            x, y, w = x.to(wide), y.to(wide), w.to(wide)
            weighted = x * w[:, None]  # (tokens, inputs)
            self.gram += (x.T @ weighted).to(self.gram.device)
            self.cross += (weighted.T @ y).to(self.cross.device)
            self.square += float((y.double().square().sum(1) * w.double()).sum())
            self.tokens += len(x)

    def solution(self, ridge: float) -> Tensor:
        """(inputs, outputs) float64: the X that minimises the weighted squares plus ridge * sum_i gram_ii |X_i|^2.

        The penalty is relative to the size of each input, so that the scale in which an input comes does not matter:
        on average, noise of the relative variance `ridge` on every input would do the same. An input that
        is always zero gets zero.
        """
        factor = torch.linalg.cholesky(self._penalised(ridge))  # of a matrix that is gone when this is used
        return torch.cholesky_solve(self.cross, factor)

    def _penalised(self, ridge: float) -> Tensor:
        """The matrix that `solution` solves with, (inputs, inputs)."""
        diagonal = self.gram.diagonal()
        silent = diagonal == 0
        penalised = self.gram.clone()
        penalised.diagonal().add_(ridge * diagonal + silent)
        # The last term keeps collinear inputs solvable where the ridge is tiny.
        penalised.diagonal().add_(torch.finfo(torch.float64).eps * len(diagonal) * diagonal.max())
        return penalised

    def error(self, solution: Tensor | None = None) -> float:
        """The weighted squares that `solution` (inputs, outputs) leaves; without one, those that are missing now."""
        if solution is None:
            return self.square
        fitted = torch.sum(solution * (self.gram @ solution)) - 2 * torch.sum(solution * self.cross)
        return self.square + float(fitted)


def place_of_sums(inputs: int, outputs: int, device: torch.device) -> torch.device:
    """Where the sums of a map are kept and solved: on the device that it runs on, or on the host if they do not fit."""
    fits = device.type == "cpu" or bytes_of_sums(inputs, outputs) < free_memory(device)
    return device if fits else torch.device("cpu")


def bytes_of_sums(inputs: int, outputs: int) -> int:
    """What the sums of a map and their solution take."""
    return _COPIES * torch.float64.itemsize * inputs * (inputs + outputs)


@dataclass(frozen=True)
class Fit:
    """A ridge solution and what it does on held-out tokens.

    solution: (inputs, outputs) float64. before, after: mean weighted squares of a held-out token without and with it.
    """

    solution: Tensor
    before: float
    after: float

    @property
    def helps(self) -> bool:
        return self.after < self.before


def solve(train: NormalEquations, held_out: NormalEquations, ridge: float) -> Fit:
    """Solve on the one, measure on the other."""
    solution = train.solution(ridge)
    before, after = held_out.error(), held_out.error(solution)
    return Fit(solution, before / held_out.tokens, after / held_out.tokens)
