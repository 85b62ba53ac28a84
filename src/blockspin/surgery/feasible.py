"""Which removals the configuration of a model can express, and candidates where only few of them are.

Most configurations express every removal: their layers are alike, or listed one by one. Some fix a pattern by periods
(Jamba), tie layers to positions (DiffLlama) or to other layers (Gemma 3n). Then a low energy is of no use if the
removal cannot be saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from ..model.blocks import check_images, find_stack
from ..model.loading import model_without_weights
from ..problem import RemovalProblem
from ..solvers.candidates import Candidate
from .checkpoint import check_attention
from .layer_config import first_proven
from .proof import alike, broken_sharing


class Removable:
    """Whether removing blocks leaves a model that a configuration describes. Answers are remembered.

    Kept layers that are, one by one, of the same make as those of a removal asked before get the same answer. The last
    word has the surgery, which also tries other periods and runs the result.
    """

    def __init__(self, config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
        self._config, self._trust = config, trust_remote_code
        self._model = self._build(config)
        layers = find_stack(self._model)[1]
        self.makes: list[int] = []  # of each layer: the first layer that is like it
        for j, layer in enumerate(layers):
            firsts = dict.fromkeys(self.makes)
            self.makes.append(next((i for i in firsts if alike(layers[i], layer, i, j, len(layers))), j))
        self._answers: dict[tuple[int, ...], bool] = {}

    def __call__(self, removed: Iterable[int]) -> bool:
        gone = sorted(removed)
        kept = [i for i in range(len(self.makes)) if i not in gone]
        try:
            check_attention(self._model, kept)
            check_images(self._model, gone)
        except ValueError:
            return False
        if any(broken_sharing(self._config, self._model, kept)):
            return False
        make = self._make(gone)
        if make not in self._answers:
            found, _ = first_proven(self._config, self._model, kept, self._build, thorough=False)
            self._answers[make] = found is not None
        return self._answers[make]

    def some(self, removals: Iterable[tuple[int, ...]], examine: int = 4) -> list[tuple[int, ...]]:
        """Those removals of which it is known that they are possible; of the others the first `examine` are asked."""
        possible = []
        for removed in removals:
            known = self._answers.get(self._make(removed), examine > 0)
            examine -= self._make(removed) not in self._answers
            if known and self(removed):
                possible.append(removed)
        return possible

    def _make(self, removed: Iterable[int]) -> tuple[int, ...]:
        """What the layers that are left are like."""
        gone = {*removed}
        return tuple(make for i, make in enumerate(self.makes) if i not in gone)

    def _build(self, config: PretrainedConfig) -> PreTrainedModel:
        return model_without_weights(config, trust_remote_code=self._trust)


def keep_what_must_stay(problem: RemovalProblem, removable: Removable) -> RemovalProblem:
    """The problem in which blocks that cannot go alone are protected too, if enough others can go."""
    fixed = [i for i in problem.reduced.block.tolist() if not removable([i])]
    try:
        return problem.with_protected({*problem.protect, *fixed})
    except ValueError:  # not enough are left: the blocks can only go together
        return problem


def aligned(
    problem: RemovalProblem, removable: Removable, start: Iterable[int], *, states: int = 20, seed: int = 0
) -> list[Candidate]:
    """Low-energy removals after which the kept layers are of the same make, one by one, as after the removal `start`.

    Found by exchanging blocks: steepest descent from `start` and from where a random walk from there passes. Empty if
    `start` itself is not possible.
    """
    first = tuple(sorted(start))
    if not problem.allows(first) or not removable(first):
        return []
    makes = removable.makes
    pattern = np.delete(makes, first).tolist()

    def neighbours(removed: tuple[int, ...]) -> list[tuple[int, ...]]:
        pairs = [(i, j) for i in removed for j in range(len(makes)) if j not in removed and makes[i] == makes[j]]
        others = (tuple(sorted({*removed, j} - {i})) for i, j in pairs)
        return [other for other in others if np.delete(makes, other).tolist() == pattern and problem.allows(other)]

    rng = np.random.default_rng(seed)
    energies: dict[tuple[int, ...], float] = {}
    here = first
    for _ in range(states):
        lowest = here
        energies[here] = problem.energy(here)
        while near := neighbours(lowest):
            energies |= {removed: problem.energy(removed) for removed in near}
            step = min(near, key=lambda removed: energies[removed])
            if energies[step] >= energies[lowest]:
                break
            lowest = step
        for _ in range(2 * len(first)):
            near = neighbours(here)
            here = near[rng.integers(len(near))] if near else here
    order = sorted(energies, key=lambda removed: (energies[removed], removed))[:states]
    return [Candidate(removed, f"aligned:{k}", energies[removed]) for k, removed in enumerate(order)]
