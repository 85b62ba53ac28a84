"""Which removals the configuration of a model can express, and candidates where it can express only few.

Most configurations express every removal: their layers are alike, or listed one by one. Some fix a pattern by periods
(Jamba), tie layers to positions (DiffLlama) or to other layers (Gemma 3n). Then a low energy is of no use if the
removal cannot be saved. Everything that depends on this is here: which blocks to protect, which candidates to drop, and
what to put in their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..model.blocks import find_stack
from ..model.loading import model_without_weights
from ..problem import Block, Removal, RemovalProblem, Units, block_of, units_of
from ..progress import console
from ..solvers import solve
from ..solvers.candidates import Candidate
from .absent import stock_config
from .layer_config import Shortening, first_proven
from .proof import alike, broken_sharing, obstacle

Pattern = tuple[int, ...]  # for each layer in order: the first layer of the whole model that is built like it


class Removable:
    """Whether a configuration describes the model without some blocks. Answers are remembered.

    Removals that leave the same pattern of layers get the same answer, so that few models are built. The last word has
    the surgery, which also tries other periods and runs the result.

    units: what the numbers of a removal stand for; blocks where nothing is said of them. Where sub-layers go, the
        blocks that lose all of theirs must be able to go, and an attention must stay.
    pattern: of the whole model.
    """

    def __init__(
        self, config: PretrainedConfig, units: Sequence[Block] = (), *, trust_remote_code: bool = False
    ) -> None:
        config = stock_config(config)  # what it lacks already, surgery leaves out again
        self._config, self._trust_remote_code = config, trust_remote_code
        self._sublayers = units if units_of(units) == "sublayers" else ()
        self._model = self._build(config)
        self.pattern = pattern_of(list(find_stack(self._model).layers))
        self._answers: dict[Pattern, bool] = {}

    def __call__(self, removed: Iterable[int]) -> bool:
        removed = set(removed)
        attending = {unit.index for unit in self._sublayers if "attention" in unit.kind.split("+")}
        if attending and attending <= removed:
            return False
        gone = self._blocks_in(removed)
        kept = [i for i in range(len(self.pattern)) if i not in gone]
        if obstacle(self._model, gone, kept) is not None:
            return False

        # Some blocks use keys, values or features that others make.
        if any(broken_sharing(self._config, self._model, kept)):
            return False

        pattern = without(self.pattern, gone)
        if pattern not in self._answers:
            wanted = Shortening(self._config, self._model, kept, self._build)
            shortened, _ = first_proven(wanted, thorough=False)
            self._answers[pattern] = shortened is not None
        return self._answers[pattern]

    @property
    def units(self) -> Units:
        """What the numbers of a removal stand for."""
        return "sublayers" if self._sublayers else "blocks"

    @property
    def architecture(self) -> str:
        """The class of the model."""
        return type(self._model).__name__

    def _blocks_in(self, removed: Iterable[int]) -> list[int]:
        """The blocks that go, all sub-layers of which are in the removal."""
        if not self._sublayers:
            return sorted(removed)
        left = {block_of(unit) for unit in self._sublayers if unit.index not in set(removed)}
        return [i for i in range(len(self.pattern)) if i not in left]

    def among(self, removals: Iterable[Removal], new_patterns: int = 4) -> list[Removal]:
        """Those of the removals that can be expressed.

        A pattern that was not seen before costs the building of a model: beyond the first `new_patterns` of them,
        removals that leave a new one are dropped unexamined.
        """
        possible = []
        for removed in removals:
            if without(self.pattern, self._blocks_in(removed)) not in self._answers:
                if new_patterns == 0:
                    continue
                new_patterns -= 1
            if self(removed):
                possible.append(removed)
        return possible

    def first_of(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The first candidate that can be expressed, in a list; an empty list if there is none."""
        for candidate in candidates:
            if self(candidate.removed):
                return [candidate]
        return []

    def _build(self, config: PretrainedConfig) -> PreTrainedModel:
        return model_without_weights(config, trust_remote_code=self._trust_remote_code)


def pattern_of(layers: Sequence[nn.Module]) -> Pattern:
    """Which layers are built alike: the same modules, shapes and settings, whatever their weights."""
    pattern: list[int] = []
    for j, layer in enumerate(layers):
        sort = j  # a new one, unless an earlier layer is like it
        for i in sorted(set(pattern)):
            if alike(layers[i], layer, i, j, len(layers)):
                sort = i
                break
        pattern.append(sort)
    return tuple(pattern)


def without(pattern: Pattern, removed: Iterable[int]) -> Pattern:
    """The pattern of the layers that a removal keeps."""
    gone = set(removed)
    return tuple(first for i, first in enumerate(pattern) if i not in gone)


def protect_what_must_stay(problem: RemovalProblem, removable: Removable) -> RemovalProblem:
    """The problem itself if a low removal can be expressed; else one that also protects blocks that cannot go alone.

    Blocks that can only go together stay free where not enough others are left to meet the goal.
    """
    (lowest,) = solve(problem, states=1, solver="tabu").states
    if removable(lowest.removed):
        return problem

    with console.status("Looking for blocks that can go"):
        fixed = [i for i in problem.reduced.block.tolist() if not removable([i])]
    try:
        narrower = problem.with_protected({*problem.protect, *fixed})
    except ValueError:  # not enough are left
        return problem

    if fixed:
        console.print(f"The configuration of this model cannot do without the blocks {fixed}; they are protected.")
    return narrower


def keep_possible(
    pool: Sequence[Candidate],
    problem: RemovalProblem,
    removable: Removable,
    start: Removal,
    *,
    states: int = 20,
    seed: int = 0,
) -> list[Candidate]:
    """The candidates of a pool that can be expressed; if not all can, with `same_pattern_candidates` of `start` added.

    Raises:
        ValueError: there is none.
    """
    possible = [candidate for candidate in pool if removable(candidate.removed)]
    if len(possible) < len(pool):
        known = {candidate.removed for candidate in possible}
        others = same_pattern_candidates(problem, removable, start, states=states, seed=seed)
        possible += [candidate for candidate in others if candidate.removed not in known]

    if not possible:
        raise ValueError(
            f"no removal was found that meets the goal and that the configuration of {removable.architecture} can "
            "express; try another number of blocks, or see what `blockspin prune --blocks` says of some"
        )
    return possible


def same_pattern_candidates(
    problem: RemovalProblem, removable: Removable, start: Iterable[int], *, states: int = 20, seed: int = 0
) -> list[Candidate]:
    """Low-energy removals that leave the same pattern of layers as the removal `start`, the lowest first.

    Found by exchanges of blocks: steepest descent from `start` and from where a random walk from there passes. Empty if
    `start` itself is not possible.
    """
    first = tuple(sorted(start))
    if problem.units == "sublayers":  # an exchange of sub-layers may leave another pattern of blocks
        return []
    if not problem.allows(first) or not removable(first):
        return []

    rng = np.random.default_rng(seed)
    energies: dict[Removal, float] = {}  # of every removal seen
    here = first
    for _ in range(states):
        _descend(problem, removable.pattern, here, energies)

        # Walk on at random, far enough to exchange every block twice; the next descent starts there.
        for _ in range(2 * len(first)):
            near = exchanges(problem, removable.pattern, here)
            here = near[rng.integers(len(near))] if near else here

    lowest = sorted(energies, key=lambda removed: (energies[removed], removed))[:states]
    return [Candidate(removed, f"same pattern:{k}", energies[removed]) for k, removed in enumerate(lowest)]


def exchanges(problem: RemovalProblem, pattern: Pattern, removed: Removal) -> list[Removal]:
    """The allowed removals that keep one block of `removed` and take another like it, and leave the same pattern."""
    left = without(pattern, removed)
    found = []
    for back in removed:
        for gone in range(len(pattern)):
            if gone in removed or pattern[gone] != pattern[back]:
                continue
            other = tuple(sorted({*removed, gone} - {back}))
            if without(pattern, other) == left and problem.allows(other):
                found.append(other)
    return found


def _descend(problem: RemovalProblem, pattern: Pattern, start: Removal, energies: dict[Removal, float]) -> None:
    """Steepest descent by exchanges; adds the energies of all removals on the way, and of their neighbours."""
    lowest = start
    energies[lowest] = problem.energy(lowest)
    while near := exchanges(problem, pattern, lowest):
        for removed in near:
            energies[removed] = problem.energy(removed)
        best = min(near, key=lambda removed: energies[removed])
        if energies[best] >= energies[lowest]:
            break
        lowest = best
