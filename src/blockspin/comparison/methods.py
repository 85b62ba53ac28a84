"""The methods of a comparison by name, what several of them share, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .. import baselines
from ..config import CompressConfig
from ..energies import Energies
from ..model.blocks import find_stack
from ..model.quality import shared_losses
from ..model.residual import stream_of
from ..model.tracing import trace_model
from ..problem import RemovalProblem
from ..selection.select import ACTIVATION_SAMPLES, select_with_energies
from ..solvers import Spectrum
from ..solvers.candidates import Candidate, random_candidate, states_as_candidates
from ..stages import Samples
from ..surgery.feasible import Removable

RANDOM_DRAWS = 5
PAPER = "empirical-fisher"  # the energy of CBO:k; ours is that of the settings
SELECTED = "CBO, selected"


@dataclass
class Cost:
    """passes: forward passes over the calibration samples that would cost as much; a backward pass counts as one more
    through the activations and one more through the weights."""

    passes: float = 0.0
    seconds: float = 0.0


@contextmanager
def counted(model: nn.Module, tokens: int) -> Iterator[Cost]:
    """Counts the blocks that run inside, bypassed ones not, in passes of the whole model over `tokens` tokens."""
    cost, started = Cost(), time.perf_counter()
    stack = find_stack(model).layers

    def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = stream_of(args, kwargs), output[0] if isinstance(output, tuple) else output
        if after is not before:  # a bypassed block hands on the very tensor that it got
            weights = any(p.requires_grad for p in layer.parameters())
            runs = 1 + int(after.requires_grad) * (1 + int(weights))
            cost.passes += runs * after.shape[0] * after.shape[1] / len(stack) / tokens

    with ExitStack() as hooks:
        for layer in stack:
            hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield cost
    cost.seconds = time.perf_counter() - started


@dataclass
class Bench:
    """What the methods are given. `shared` keeps what several of them need, computed when first asked for.

    energies: by name. problems, spectra: by (name of the energy, goal).
    """

    model: nn.Module
    samples: Samples
    config: CompressConfig
    removable: Removable
    costs: dict[str, Cost]
    energies: dict[str, Energies] = field(default_factory=dict)
    problems: dict[tuple[str, str], RemovalProblem] = field(default_factory=dict)
    spectra: dict[tuple[str, str], Spectrum] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.samples.calibration))

    def shared(self, name: str, compute: Callable[..., Any], samples: Sequence[Tensor]) -> Any:
        if name not in self.values:
            with counted(self.model, self.tokens) as cost:
                self.values[name] = compute(self.model, samples, batch_size=self.config.batch_size, progress=True)
            self.costs[name] = cost
        return self.values[name]

    def activations(self) -> baselines.Activations:
        value: baselines.Activations = self.shared(
            "activations", baselines.measure_activations, self.samples.calibration
        )
        return value

    def losses_without_each(self) -> Any:
        return self.shared("losses without each", baselines.losses_without_each, self.samples.selection)

    def weight_importance(self) -> Any:
        return self.shared("weight importance", baselines.weight_importance, self.samples.calibration)

    def losses_of_states(self, energy: str, goal: str) -> list[float]:
        """Losses of the first states of a goal's spectrum on the selection samples."""

        def compute(model: nn.Module, samples: Sequence[Tensor], **options: Any) -> list[float]:
            states = self.spectra[energy, goal].states[: self.config.max_candidates]
            return shared_losses(trace_model(model), [state.removed for state in states], samples, **options)

        losses: list[float] = self.shared(f"states {energy} {goal}", compute, self.samples.selection)
        return losses


# name -> (the shared costs it depends on, "{goal}" filled in; what it chooses for a problem).
Method = tuple[tuple[str, ...], Callable[[Bench, RemovalProblem, str], Candidate | baselines.Merged | list[Candidate]]]


def methods(config: CompressConfig) -> dict[str, Method]:
    """Every method by name, in the order in which they run: cheap ones first."""
    count = config.max_candidates

    def searching(search: Callable[..., Any], **options: Any) -> Callable[[Bench, RemovalProblem, str], Any]:
        return lambda bench, problem, goal: search(
            bench.model, bench.samples.selection, problem, batch_size=config.batch_size, progress=True, **options
        )

    paper = (f"energy {PAPER}", f"solve {PAPER} {{goal}}")
    ours = (f"energy {config.energy}", f"solve {config.energy} {{goal}}")
    return {
        SELECTED: (ours, _selected),
        **({f"CBO:0, {config.energy}": (ours, _state(config.energy, 0))} if config.energy != PAPER else {}),
        **{f"CBO:{k}": (paper, _state(PAPER, k)) for k in range(min(3, config.states))},
        f"CBO, best of {count}": ((*paper, f"states {PAPER} {{goal}}"), _best_state),
        "last blocks": ((), lambda bench, problem, goal: baselines.last_blocks(problem)),
        "random": (
            (),
            lambda bench, problem, goal: [random_candidate(problem, config.seed + k) for k in range(RANDOM_DRAWS)],
        ),
        "block influence": (
            ("activations",),
            lambda bench, problem, goal: baselines.block_influence(problem, bench.activations()),
        ),
        "norm ratio": (
            ("activations",),
            lambda bench, problem, goal: baselines.norm_ratio(problem, bench.activations()),
        ),
        "angular distance": (
            ("activations",),
            lambda bench, problem, goal: baselines.angular_distance(problem, bench.activations()),
        ),
        "iterative block influence": (
            (),
            lambda bench, problem, goal: baselines.iterative_block_influence(
                bench.model, bench.samples.calibration, problem, batch_size=config.batch_size, progress=True
            ),
        ),
        **{
            f"Shortened LLaMA {name}{'+' * plus}": ((need,), _shortened(need, plus))
            for name, need in (("PPL", "losses without each"), ("Taylor", "weight importance"))
            for plus in (False, True)
        },
        "sliding-window merging": ((), searching(baselines.sliding_window_merging)),
        "SLEB": ((), searching(baselines.sleb)),
        "EvoPress": ((), searching(baselines.evopress, budget=config.budget)),
    }


def _selected(bench: Bench, problem: RemovalProblem, goal: str) -> Candidate:
    """`blockspin select`: the race of a pool and the polish of its winner."""
    config = bench.config
    selection, _ = select_with_energies(
        bench.model,
        bench.energies[config.energy],
        bench.problems[config.energy, goal],
        bench.spectra[config.energy, goal],
        bench.samples.selection,
        bench.samples.calibration[:ACTIVATION_SAMPLES],
        bench.removable,
        seed=config.seed,
        max_candidates=config.max_candidates,
        batch_size=config.batch_size,
        objective=config.objective,
        budget=config.budget,
    )
    return selection.chosen


def _best_state(bench: Bench, problem: RemovalProblem, goal: str) -> Candidate:
    """What the paper does by hand: the best of the first states."""
    losses = bench.losses_of_states(PAPER, goal)
    k = losses.index(min(losses))
    return replace(states_as_candidates(bench.spectra[PAPER, goal])[k], loss=losses[k])


def _state(energy: str, k: int) -> Callable[[Bench, RemovalProblem, str], Candidate]:
    def choose(bench: Bench, problem: RemovalProblem, goal: str) -> Candidate:
        states = states_as_candidates(bench.spectra[energy, goal])
        if k >= len(states):
            raise ValueError(f"there are only {len(states)} states")
        return states[k]

    return choose


def _shortened(need: str, plus: bool) -> Callable[[Bench, RemovalProblem, str], Candidate]:
    def choose(bench: Bench, problem: RemovalProblem, goal: str) -> Candidate:
        scores = bench.losses_without_each() if need == "losses without each" else bench.weight_importance()
        return baselines.shortened_llama(problem, scores, "Shortened LLaMA", plus=plus)

    return choose
