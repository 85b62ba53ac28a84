"""Sub-layers as units: found, left out and gated exactly, with energies and selections of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import FAMILIES, InFloat64, random_samples, tiny_model
from tiny import tiny_config, tiny_random_model
from torch import Tensor

from blockspin.baselines import block_influence, measure_activations, sleb
from blockspin.energies import estimate_energies, load_energies
from blockspin.energies.gradients import estimate_gradients
from blockspin.model.batches import make_batches
from blockspin.model.blocks import find_stack
from blockspin.model.gates import gated
from blockspin.model.passes import num_passes, removal_passes
from blockspin.model.streaming import jobs_of, swept
from blockspin.model.tracing import TracedModel, closed, find_units, skipped, trace_model
from blockspin.problem import Removal, RemovalProblem, Sublayer, units_of
from blockspin.selection.select import run_selection
from blockspin.solvers.candidates import Candidate

TWO_BRANCHES = [family for family in FAMILIES if family != "gpt_neox"]
SAMPLES = random_samples((9, 9))
BATCH = make_batches(SAMPLES, 2)[0]
REMOVALS: list[Removal] = [(0,), (1,), (6,), (0, 1), (2, 5), (1, 3, 4, 7), (0, 2, 4, 6), (1, 2, 3, 5, 6, 7)]


def without_modules(model: tf.PreTrainedModel, family: str, removed: Sequence[int]) -> Tensor:
    """The logits where the modules that make these branches return zeros: the reference."""

    def zeros(module: torch.nn.Module, args: object, output: object) -> object:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        assert isinstance(output, Tensor)
        return torch.zeros_like(output)

    names = FAMILIES[family][1]
    with ExitStack() as hooks, torch.no_grad():
        for unit in removed:
            layer = find_stack(model).layers[unit // 2]
            hooks.callback(layer.get_submodule(names[unit % 2]).register_forward_hook(zeros).remove)
        return BATCH.forward(model)


@pytest.mark.parametrize("family", TWO_BRANCHES)
def test_every_branch_is_a_unit_with_the_modules_that_serve_it(family: str) -> None:
    model = tiny_model(family)
    units = find_units(model, "sublayers")
    assert [unit.index for unit in units] == list(range(8))
    assert [unit.kind for unit in units] == ["attention", "mlp"] * 4
    assert [(unit.block, unit.branch) for unit in units if isinstance(unit, Sublayer)] == [
        (block, branch) for block in range(4) for branch in range(2)
    ]

    # Together they hold what the blocks hold.
    by_block = [block.num_parameters for block in find_units(model)]
    assert [a.num_parameters + b.num_parameters for a, b in zip(units[::2], units[1::2], strict=True)] == by_block


def test_blocks_of_one_branch_are_units_themselves() -> None:
    units = find_units(tiny_model("gpt_neox"), "sublayers")
    assert [(unit.kind, unit.num_parameters) for unit in units] == [
        (block.kind, block.num_parameters) for block in find_units(tiny_model("gpt_neox"))
    ]
    assert units_of(units) == "sublayers"


def test_experts_and_mixers_are_kinds() -> None:
    found = {unit.kind for unit in find_units(tiny_random_model(tiny_config("qwen3_moe")), "sublayers")}
    assert found == {"attention", "moe"}
    found = {unit.kind for unit in find_units(tiny_random_model(tiny_config("jamba")), "sublayers")}
    assert {"attention", "mamba"} < found


@pytest.mark.parametrize("family", TWO_BRANCHES)
@pytest.mark.parametrize("leaving_out", [skipped, closed])
def test_without_units_the_logits_are_those_with_zeros_in_their_place(
    family: str, leaving_out: Callable[[TracedModel, Removal], ExitStack]
) -> None:
    model = tiny_model(family)
    traced = trace_model(model, "sublayers")
    for removed in REMOVALS:
        with torch.no_grad(), leaving_out(traced, removed):
            found = BATCH.forward(model)
        torch.testing.assert_close(found, without_modules(model, family, removed))


def test_what_is_removed_does_not_run() -> None:
    model = tiny_model("llama")
    traced = trace_model(model, "sublayers")
    assert traced.has_independent_blocks
    runs: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output, i=i: runs.append(2 * i))
        layer.mlp.up_proj.register_forward_hook(lambda module, args, output, i=i: runs.append(2 * i + 1))
    with torch.no_grad(), skipped(traced, (1, 2, 4, 5)):
        BATCH.forward(model)
    assert runs == [0, 3, 6, 7]
    assert num_passes(traced, [(1, 2, 4, 5)]) == 0.5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_shared_and_streamed_passes_are_those_of_each_removal(family: str) -> None:
    model = tiny_model(family)
    traced = trace_model(model, "sublayers")
    assert traced.shares_passes
    removals: list[Removal] = [(), *REMOVALS]
    jobs = jobs_of(traced, removals, make_batches(SAMPLES, "auto"))
    for passes in (removal_passes(traced, removals, SAMPLES), swept(traced, jobs)):
        for _, outputs in passes:
            first = True
            for k, hidden in outputs:
                assert not first or not removals[k]  # nothing removed comes first
                first = False
                logits = traced.halves.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
                torch.testing.assert_close(logits, without_modules(model, family, removals[k]))


def test_gradients_are_those_of_finite_differences() -> None:
    with InFloat64():
        model = tiny_model("llama").double()
        found = estimate_gradients(model, SAMPLES, units="sublayers", progress=False)
        traced, step = trace_model(model, "sublayers"), 1e-5
        for unit in (0, 3, 6):
            losses = []
            for change in (step, -step):
                alphas = torch.ones(2, 8, dtype=torch.float64)
                alphas[:, unit] += change
                with torch.no_grad(), gated(traced, alphas):
                    logits = BATCH.forward(model)
                targets = BATCH.token_ids[:, 1:]
                losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].mT, targets, reduction="none").mean(1))
            slopes = (losses[0] - losses[1]) / (2 * step)  # (2,)
            np.testing.assert_allclose(found.matrix[list(BATCH.indices), unit], slopes.numpy(), rtol=1e-3, atol=1e-6)


def divergence(model: tf.PreTrainedModel, removed: Sequence[int]) -> float:
    """KL from the whole model, nats a token, by modules that return zeros."""
    whole, left = (without_modules(model, "llama", gone).log_softmax(-1)[:, :-1] for gone in ((), removed))
    return float((whole.exp() * (whole - left)).sum(-1).mean())


def test_pairwise_energies_are_the_divergences_of_singles_and_pairs(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = estimate_energies("pairwise", model, SAMPLES, units="sublayers", progress=False)
    problem = RemovalProblem(found.hessian, 2, blocks=found.blocks)
    assert problem.units == "sublayers"
    for removed in [(0, 1), (2, 7), (4, 5)]:
        assert problem.energy(removed) == pytest.approx(divergence(model, removed), rel=1e-4)

    found.save(tmp_path / "energies.safetensors")
    assert load_energies(tmp_path / "energies.safetensors").blocks == found.blocks


@pytest.mark.parametrize("energy", ["fitted", "secant", "fisher"])
def test_every_kind_of_energy_has_sublayers(energy: str) -> None:
    found = estimate_energies(energy, tiny_model("llama"), random_samples() * 2, units="sublayers", progress=False)
    assert found.hessian.shape == (8, 8)
    assert np.isfinite(found.hessian).all()


def test_selection_finds_the_best_of_all_removals() -> None:
    model = tiny_model("llama")
    problem = RemovalProblem(np.eye(8), {"attention": 1, "mlp": 1}, blocks=find_units(model, "sublayers"))
    every = [removed for removed in combinations(range(8), 2) if problem.allows(removed)]
    assert len(every) == 16
    chosen = run_selection(
        model, [Candidate(removed, "all") for removed in every], SAMPLES, problem=problem, always=every, progress=False
    ).chosen
    best = min(every, key=lambda removed: divergence(model, removed))
    assert chosen.removed == best
    assert chosen.loss == pytest.approx(divergence(model, best), rel=1e-4)


def test_scores_of_sublayers_are_cosines_over_their_branches() -> None:
    """The score of LLM-Drop, from the states that enter and leave each sub-layer, taken by hooks on the norms."""
    model = tiny_model("llama")
    states: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                hooks.callback(norm.register_forward_pre_hook(lambda module, args: states.append(args[0])).remove)
        hooks.callback(model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0])).remove)
        BATCH.forward(model)
    expected = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]

    found = measure_activations(model, SAMPLES, units="sublayers")
    np.testing.assert_allclose(found.cosine, torch.stack(expected).numpy(), rtol=1e-5)
    problem = RemovalProblem(np.eye(8), {"attention": 2}, blocks=find_units(model, "sublayers"))
    most_alike = sorted(range(0, 8, 2), key=lambda unit: -found.cosine[unit])[:2]
    assert block_influence(problem, found).removed == tuple(sorted(most_alike))


def test_greedy_search_by_loss_takes_sublayers() -> None:
    """SLEB on sub-layers is BlockPruner: each step takes the one without which the loss is lowest."""
    model = tiny_model("llama")
    problem = RemovalProblem(np.eye(8), 2, blocks=find_units(model, "sublayers"))

    def loss(removed: Sequence[int]) -> float:
        logits = without_modules(model, "llama", removed)[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), BATCH.token_ids[:, 1:].flatten()))

    first = min(range(8), key=lambda unit: loss([unit]))
    second = min({*range(8)} - {first}, key=lambda unit: loss([first, unit]))
    assert sleb(model, SAMPLES, problem).removed == tuple(sorted([first, second]))
