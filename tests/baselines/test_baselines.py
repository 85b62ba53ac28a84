"""Every method against an independent computation on a tiny model, and within every kind of constraint."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import plain_loss, random_samples, tiny_model

from blockspin import baselines
from blockspin.model.blocks import find_stack
from blockspin.model.losses import mean_loss
from blockspin.model.tracing import trace_model
from blockspin.problem import Block, RemovalProblem
from blockspin.solvers.candidates import fill, open_blocks, random_candidate
from blockspin.surgery.memory import remove_blocks

SAMPLES = random_samples()


def deep_llama(layers: int = 7, seed: int = 0) -> tf.PreTrainedModel:
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(1 + (i * 5) % 7)  # blocks of different weight, in no simple order
    return model


def states_of(model: tf.PreTrainedModel, sample: torch.Tensor) -> list[torch.Tensor]:
    """h_0..h_N, each (length, width): what transformers returns, the last replaced by the state before the norm."""
    caught = []
    handle = find_stack(model).layers[-1].register_forward_hook(lambda layer, args, output: caught.append(output))
    with torch.no_grad():
        hidden = model(sample[None], output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    last = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    return [h[0].double() for h in (*hidden[:-1], last)]


def problems(n: int) -> list[RemovalProblem]:
    """One of every kind of constraint."""
    blocks = [Block(i, "even" if i % 2 == 0 else "odd", 100 + 7 * i) for i in range(n)]
    return [
        RemovalProblem(np.eye(n), 3),
        RemovalProblem(np.eye(n), 2, protect=(0, 3)),
        RemovalProblem(np.eye(n), {"even": 2, "odd": 1}, blocks=blocks),
        RemovalProblem(np.eye(n), {"odd": 3}, blocks=blocks),
        RemovalProblem(np.eye(n), remove_parameters=0.4, blocks=blocks),
        RemovalProblem(np.eye(n), remove_parameters=0.3, blocks=blocks, protect=(1,)),
    ]


@pytest.mark.parametrize("which", range(6))
def test_filling_meets_every_constraint_for_every_order(which: int) -> None:
    problem = problems(7)[which]
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(7).tolist()
        removed = fill(problem, order)
        assert problem.allows(removed)
        assert open_blocks(problem, removed) == []


def test_filling_a_budget_that_only_some_blocks_can_stay_from() -> None:
    """Of 1, 1 and 100 parameters 101 must go: the large block may not be the one that stays, whatever the order."""
    blocks = [Block(i, "a", size) for i, size in enumerate((1, 1, 100))]
    problem = RemovalProblem(np.eye(3), remove_parameters=101 / 102, blocks=blocks)
    assert {fill(problem, order) for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0])} == {(0, 2), (1, 2)}


def test_filling_takes_the_first_in_order() -> None:
    assert fill(RemovalProblem(np.eye(6), 2, protect=(5,)), [5, 3, 1, 0, 2, 4]) == (1, 3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_activations_are_those_of_the_hidden_states(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    found = baselines.measure_activations(model, SAMPLES, batch_size=batch_size)
    states = [states_of(model, sample) for sample in SAMPLES]
    cosine = torch.nn.functional.cosine_similarity
    tokens = sum(map(len, SAMPLES))
    for i in range(4):
        influence = sum(float(cosine(s[i], s[i + 1], dim=-1).sum()) for s in states) / tokens
        ratio = sum(float((s[i + 1].norm(dim=-1) / s[i].norm(dim=-1)).sum()) for s in states) / tokens
        assert found.cosine[i] == pytest.approx(influence, abs=1e-5)
        assert found.ratio[i] == pytest.approx(ratio, rel=1e-4)
        for j in range(i + 1, 5):
            angles = [math.acos(float(cosine(s[i][-1], s[j][-1], dim=0))) / math.pi for s in states]
            assert found.angle[i, j] == pytest.approx(np.mean(angles), abs=1e-4)


def test_scores_choose_the_blocks_of_their_definition() -> None:
    model, problem = deep_llama(), RemovalProblem(np.eye(7), 3)
    activations = baselines.measure_activations(model, SAMPLES)
    lowest = tuple(sorted(np.argsort(1 - activations.cosine)[:3].tolist()))
    assert baselines.block_influence(problem, activations).removed == lowest
    assert baselines.norm_ratio(problem, activations).removed == tuple(
        sorted(np.argsort(activations.ratio)[:3].tolist())
    )
    start = min(range(5), key=lambda first: activations.angle[first, first + 3])
    assert baselines.angular_distance(problem, activations).removed == (start, start + 1, start + 2)
    assert baselines.last_blocks(problem).removed == (4, 5, 6)
    assert baselines.last_blocks(RemovalProblem(np.eye(7), 3, protect=(5,))).removed == (3, 4, 6)


def test_angular_distance_needs_a_run_of_blocks() -> None:
    activations = baselines.measure_activations(deep_llama(), SAMPLES)
    assert baselines.angular_distance(RemovalProblem(np.eye(7), 3, protect=(3,)), activations).removed in (
        (0, 1, 2),
        (4, 5, 6),
    )
    with pytest.raises(ValueError, match="consecutive"):
        baselines.angular_distance(RemovalProblem(np.eye(7), 3, protect=(2, 5)), activations)


def test_iterative_indices_are_those_of_the_original_model() -> None:
    """Against real removals: after each one the shortened model is measured afresh and its index mapped back."""
    model = deep_llama()
    chosen: list[int] = []
    for _ in range(4):
        kept = [i for i in range(7) if i not in chosen]
        smaller = remove_blocks(model, chosen)
        states = [states_of(smaller, sample) for sample in SAMPLES]
        cosine = [
            sum(float(torch.nn.functional.cosine_similarity(s[i], s[i + 1], dim=-1).sum()) for s in states)
            for i in range(len(kept))
        ]
        chosen.append(kept[int(np.argmax(cosine))])
    found = baselines.iterative_block_influence(model, SAMPLES, RemovalProblem(np.eye(7), 4), batch_size=2)
    assert found.removed == tuple(sorted(chosen))


def test_losses_without_each_block() -> None:
    model = deep_llama()
    expected = [mean_loss(remove_blocks(model, [i]), SAMPLES) for i in range(7)]
    np.testing.assert_allclose(baselines.losses_without_each(model, SAMPLES, batch_size=2), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_taylor_importance_is_weight_times_gradient(batch_size: int) -> None:
    model = deep_llama()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    torch.autograd.backward(torch.stack([plain_loss(model, sample) for sample in SAMPLES]).mean())
    expected = [
        sum(float((p * p.grad).abs().sum().detach()) for p in layer.parameters()) for layer in model.model.layers
    ]
    model.zero_grad(set_to_none=True)
    model.lm_head.weight.requires_grad_(False)
    found = baselines.weight_importance(model, SAMPLES, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


def test_plus_protects_the_first_four_and_last_two() -> None:
    scores, problem = np.arange(10.0), RemovalProblem(np.eye(10), 3, protect=(5,))
    assert baselines.shortened_llama(problem, scores, "t").removed == (0, 1, 2)
    assert baselines.shortened_llama(problem, scores, "t", plus=True).removed == (4, 6, 7)
    with pytest.raises(ValueError, match="protected"):
        baselines.shortened_llama(RemovalProblem(np.eye(10), 5), scores, "t", plus=True)


def test_sleb_is_greedy_over_measured_losses() -> None:
    model = deep_llama()
    chosen: tuple[int, ...] = ()
    for _ in range(3):
        rest = [i for i in range(7) if i not in chosen and i != 2]
        chosen += (min(rest, key=lambda i: mean_loss(remove_blocks(model, (*chosen, i)), SAMPLES)),)
    found = baselines.sleb(model, SAMPLES, RemovalProblem(np.eye(7), 3, protect=(2,)))
    assert found.removed == tuple(sorted(chosen))
    assert found.loss == pytest.approx(mean_loss(remove_blocks(model, chosen), SAMPLES), rel=1e-5)


def divergence(model: tf.PreTrainedModel, removed: tuple[int, ...]) -> float:
    smaller, total = remove_blocks(model, removed), 0.0
    with torch.no_grad():
        for sample in SAMPLES:
            p, q = (m(sample[None], use_cache=False).logits[0, :-1].log_softmax(-1) for m in (model, smaller))
            total += float((p.exp() * (p - q)).sum())
    return total


def test_evopress_finds_the_removal_closest_to_the_original() -> None:
    """Among 35 removals a short evolution finds the best, and the same seed finds it again."""
    model, problem = deep_llama(), RemovalProblem(np.eye(7), 3)
    best = min(combinations(range(7), 3), key=lambda removed: divergence(model, removed))
    found = baselines.evopress(model, SAMPLES, problem, budget=40, offspring=8, seed=3)
    assert found.removed == best
    again = baselines.evopress(model, SAMPLES, problem, budget=40, offspring=8, seed=3)
    assert again == found


def test_mutations_keep_most_blocks_and_all_constraints() -> None:
    generator = np.random.default_rng(0)
    for problem in problems(7):
        parent = random_candidate(problem).removed
        seen = {baselines.search.mutated(problem, parent, generator) for _ in range(60)}
        assert len(seen) > 2 or problem.num_candidates == 1
        assert all(problem.allows(removed) for removed in seen)
        assert all(len(set(parent) - set(removed)) <= 3 for removed in seen)


def test_every_method_keeps_to_kinds_protection_and_budgets() -> None:
    model = deep_llama()
    activations = baselines.measure_activations(model, SAMPLES)
    for problem in problems(7):
        candidates = [
            baselines.last_blocks(problem),
            baselines.block_influence(problem, activations),
            baselines.norm_ratio(problem, activations),
            baselines.iterative_block_influence(model, SAMPLES, problem),
            baselines.sleb(model, SAMPLES[:2], problem),
            baselines.evopress(model, SAMPLES[:2], problem, budget=2, offspring=4),
        ]
        for candidate in candidates:
            assert problem.allows(candidate.removed), (candidate, problem)


def test_a_window_of_one_block_is_the_identity() -> None:
    model, batch_of = deep_llama(), torch.arange(2, 12)[None]
    merged = baselines.merge_windows(model, ((3, 3),))
    assert torch.equal(merged(batch_of).logits, model(batch_of).logits)


def test_merged_weights_are_those_of_the_formula() -> None:
    model = deep_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged: tf.PreTrainedModel = baselines.merge_windows(model, ((1, 3), (4, 5)))
    layers, ours = model.model.layers, merged.model.layers
    assert len(ours) == 4
    for name, weight in ours[1].named_parameters():
        theta = [layers[k].get_parameter(name) for k in (1, 2, 3)]
        torch.testing.assert_close(weight, theta[1] + theta[2] - theta[0])
    for name, weight in ours[2].named_parameters():
        torch.testing.assert_close(weight, layers[5].get_parameter(name))
    assert ours[0].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in ours] == [0, 1, 2, 3]
    with baselines.merging.merged(trace_model(model), ((1, 3), (4, 5))):
        inside = model(torch.arange(2, 12)[None], use_cache=False).logits
    torch.testing.assert_close(inside, merged(torch.arange(2, 12)[None], use_cache=False).logits)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def similarity(model: tf.PreTrainedModel, windows: tuple[tuple[int, int], ...]) -> float:
    merged, total = baselines.merge_windows(model, windows), 0.0
    with torch.no_grad():
        for sample in SAMPLES:
            a, b = (m(sample[None], output_hidden_states=True).hidden_states[-1].flatten() for m in (model, merged))
            total += float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return total / len(SAMPLES)


def windows_above(model: tf.PreTrainedModel, threshold: float) -> tuple[tuple[int, int], ...]:
    """The procedure of the paper for one threshold, step by step."""
    done: tuple[tuple[int, int], ...] = ()
    hi = lo = 5
    while lo > 0:
        if similarity(model, (*done, (lo - 1, hi))) >= threshold:
            lo -= 1
        else:
            done, hi, lo = (*done, (lo, hi)), lo - 1, lo - 1
    return tuple(sorted(w for w in (*done, (lo, hi)) if w[0] < w[1]))


@pytest.mark.parametrize("goal", [1, 2, 3, 5])
def test_merging_removes_exactly_as_many_as_asked(goal: int) -> None:
    model = deep_llama()
    found = baselines.sliding_window_merging(model, SAMPLES, RemovalProblem(np.eye(7), goal), batch_size=3)
    gone = sorted(k for lo, hi in found.windows for k in range(lo + 1, hi + 1))
    assert found.candidate.removed == tuple(gone)
    assert len(gone) == goal
    assert 6 not in gone
    plain = windows_above(model, found.threshold)
    if sum(hi - lo for lo, hi in plain) == goal:
        assert found.windows == plain
    above = windows_above(model, found.threshold + 2**-14)
    assert sum(hi - lo for lo, hi in above) < goal


def test_merging_refuses_what_it_cannot_do() -> None:
    model = deep_llama()
    kinds = [Block(i, "attention+mlp", 10) for i in range(7)]
    with pytest.raises(ValueError, match="no kinds"):
        baselines.sliding_window_merging(model, SAMPLES, RemovalProblem(np.eye(7), {"attention+mlp": 2}, blocks=kinds))
    with pytest.raises(ValueError, match="can merge away 3 blocks"):
        baselines.sliding_window_merging(model, SAMPLES, RemovalProblem(np.eye(7), 4, protect=(3,)))
