"""The repair of a shortened model, against few-line references and what must hold of any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import FAMILIES, VOCABULARY, tiny_model
from tiny import tiny_config, tiny_random_model
from torch import nn

from blockspin.model.batches import make_batches
from blockspin.model.blocks import find_stack
from blockspin.model.losses import mean_loss
from blockspin.model.quality import quality_of
from blockspin.model.spill import SpilledStates
from blockspin.repairs.aims import Aim
from blockspin.repairs.finished import FinishedBlocks
from blockspin.repairs.fitting import Fitting, Text
from blockspin.repairs.projections import matrix
from blockspin.repairs.readings import Reading
from blockspin.repairs.run import repair
from blockspin.repairs.shelf import COPIES, Held, Shelf
from blockspin.surgery.memory import remove_blocks

GEMMA_READS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
REPAIRED = {"llama": 2, "gpt2": 2, "gpt_neox": 2, "mamba2": 2, "jamba": 0, "nemotron_h": 0, "deepseek_v3": 2}


def tiny(name: str) -> tf.PreTrainedModel:
    return tiny_model(name) if name in FAMILIES else tiny_random_model(tiny_config(name))


def random_text(number: int = 24, length: int = 24, seed: int = 0) -> list[torch.Tensor]:
    """Random tokens in samples of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length - i % 5,), generator=generator) for i in range(number)]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_the_first_changes_are_least_squares_on_gathered_activations() -> None:
    """Block 2 of 4 is gone: o_proj of block 1 aims at half of what it added, down_proj at all of it."""
    original = tiny_model("llama")
    smaller = remove_blocks(original, [2])
    samples = random_text(40)
    text = Text(samples, 8, 0)
    report = repair(smaller, original, samples, batch_size=8)

    fitted = [sample for sample in samples if not any(sample is other for other in text.held_out)]
    assert report.tokens == sum(map(len, fitted))
    seen: dict[str, list[torch.Tensor]] = {"heads": [], "middle": [], "hidden": [], "end": [], "entry": []}
    layers = original.model.layers

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs=None: seen[name].append((args or tuple(kwargs.values()))[0][0].double())

    handles = [
        layers[1].self_attn.o_proj.register_forward_pre_hook(keep("heads")),
        layers[1].post_attention_layernorm.register_forward_pre_hook(keep("middle")),
        layers[2].register_forward_pre_hook(keep("entry"), with_kwargs=True),
        layers[3].register_forward_pre_hook(keep("end"), with_kwargs=True),
    ]
    with torch.no_grad():
        for sample in fitted:
            original(input_ids=sample[None])
    for handle in handles:
        handle.remove()
    heads, middle, entry, end = (torch.cat(seen[name]) for name in ("heads", "middle", "entry", "end"))

    aim = middle + (end - entry) / 2
    roots = 1 / aim.norm(dim=1, keepdim=True)
    rows, sides = heads * roots, (aim - middle) * roots
    penalty = torch.diag((0.3 * rows.square().sum(0)).sqrt())
    solution = torch.linalg.lstsq(
        torch.cat([rows, penalty]), torch.cat([sides, torch.zeros(len(penalty), sides.shape[1])])
    ).solution
    step = report.steps[0]
    assert (step.block, step.projection) == (1, "self_attn.o_proj")
    found = smaller.model.layers[1].self_attn.o_proj.weight - layers[1].self_attn.o_proj.weight
    expected = solution.T.float() if step.kept else torch.zeros_like(found)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "norm", "reader"), [("llama", "input_layernorm", "self_attn.k_proj"), ("gpt2", "ln_1", "attn.c_attn")]
)
def test_in_projections_get_the_least_squares_map_in_front(name: str, norm: str, reader: str) -> None:
    """Block 2 of 4 is gone: block 3 should read what it reads in the original."""
    original, samples = tiny_model(name), random_text(60)
    smaller = remove_blocks(original, [2])
    held_out = Text(samples, 8, 0).held_out
    fitted = [sample for sample in samples if not any(sample is other for other in held_out)]
    report = repair(smaller, original, samples, reading_ridge=0.1)
    assert next(step.kept for step in report.steps if (step.block, step.projection) == (3, reader))

    def read(model: Any, position: int) -> tuple[nn.Module, torch.Tensor]:
        layer = find_stack(model).layers[position]
        seen: list[torch.Tensor] = []
        handle = layer.get_submodule(norm).register_forward_hook(lambda module, args, output: seen.append(output[0]))
        with torch.no_grad():
            for sample in fitted:
                model(input_ids=sample[None])
        handle.remove()
        return layer.get_submodule(reader), torch.cat(seen).double()

    (new, ours), (old, theirs) = read(smaller, 2), read(original, 3)
    roots = 1 / theirs.norm(dim=1, keepdim=True)
    inputs = ours if new.bias is None else torch.cat([ours, torch.ones(len(ours), 1)], 1)
    rows = inputs * roots
    penalty = torch.diag((0.1 * rows.square().sum(0)).sqrt())
    sides = torch.cat([(theirs - ours) * roots, torch.zeros(len(penalty), ours.shape[1])])
    solution = torch.linalg.lstsq(torch.cat([rows, penalty]), sides).solution
    change = solution @ matrix(old)[: ours.shape[1]].double()
    torch.testing.assert_close(matrix(new).double(), matrix(old).double() + change, rtol=1e-3, atol=1e-4)


def test_what_can_be_recovered_exactly_is() -> None:
    """Block 2 repeats the hidden activations of block 1, which adds nothing; its down projection moves to block 1."""
    original = tiny_model("llama")
    before, gone = original.model.layers[1], original.model.layers[2]
    with torch.no_grad():
        before.self_attn.v_proj.weight.zero_()  # the attention has nothing that it could bring instead
        gone.self_attn.o_proj.weight.zero_()
        gone.mlp.gate_proj.weight.copy_(before.mlp.gate_proj.weight)
        gone.mlp.up_proj.weight.copy_(before.mlp.up_proj.weight)
        before.mlp.down_proj.weight.zero_()
    smaller = remove_blocks(original, [2])
    report = repair(smaller, original, random_text(60), ridge=1e-9)
    assert report.kl_before > 0.01
    assert report.kl_after < 1e-6 * report.kl_before


@pytest.mark.parametrize(("name", "block"), list(REPAIRED.items()))
def test_a_repair_helps_and_leaves_the_original_alone(name: str, block: int) -> None:
    original = tiny(name)
    whole = weights_of(original)
    smaller = remove_blocks(original, [block], copy=False)
    samples = random_text(64)
    report = repair(smaller, original, samples, batch_size=16)
    assert same(whole, weights_of(original))
    assert report.removed == (block,)
    assert report.steps
    assert any(step.kept for step in report.steps)
    assert all(step.kept == (step.after < step.before) for step in report.steps)
    assert report.kl_after < report.kl_before
    assert quality_of(smaller, original, Text(samples, 16, 0).held_out).kl == pytest.approx(report.kl_after, rel=1e-3)


def test_it_generalises() -> None:
    original = tiny_model("llama")
    smaller = remove_blocks(original, [1])
    fresh = random_text(32, seed=7)
    before = quality_of(smaller, original, fresh).kl
    repair(smaller, original, random_text(200))
    assert quality_of(smaller, original, fresh).kl < 0.95 * before


def test_where_it_does_not_help_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tiny_model("llama")
    smaller = remove_blocks(original, [1])
    before = weights_of(smaller)

    after = Aim.after
    monkeypatch.setattr(Aim, "after", lambda aim, addition: -after(aim, addition))
    monkeypatch.setattr(Reading, "of", lambda reading, layer, stream: torch.randn_like(stream))
    report = repair(smaller, original, random_text(64))
    assert report.undone
    assert report.kl_after == report.kl_before
    assert same(before, weights_of(smaller))
    assert "as they were" in report.summary()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_batch_size_does_not_matter(name: str) -> None:
    original = tiny(name)
    results = []
    for batch_size in (1, 7):
        smaller = remove_blocks(original, [1])
        repair(smaller, original, random_text(40), batch_size=batch_size)
        results.append(weights_of(smaller))
    for key, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][key], rtol=1e-3, atol=1e-4)


def test_a_repair_that_was_cut_off_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, samples = tiny_model("gpt2"), random_text(40)
    unbroken = remove_blocks(original, [0])
    expected = repair(unbroken, original, samples, partial=tmp_path / "unbroken")
    assert not (tmp_path / "unbroken").exists()

    add = FinishedBlocks.add

    def killed(self: FinishedBlocks, block: int, *rest: Any) -> None:
        if block == 3:
            raise KeyboardInterrupt
        add(self, block, *rest)

    monkeypatch.setattr(FinishedBlocks, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(remove_blocks(original, [0]), original, samples, partial=tmp_path / "partial")
    monkeypatch.setattr(FinishedBlocks, "add", add)

    fitted: list[int] = []
    refit = Fitting.refit

    def counted(self: Fitting, block: int, aims: Any) -> Any:
        fitted.append(block)
        return refit(self, block, aims)

    monkeypatch.setattr(Fitting, "refit", counted)
    continued = remove_blocks(original, [0])
    assert repair(continued, original, samples, partial=tmp_path / "partial") == expected
    assert fitted == [3]
    assert same(weights_of(unbroken), weights_of(continued))

    monkeypatch.setattr(FinishedBlocks, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        repair(remove_blocks(original, [0]), original, samples, partial=tmp_path / "partial")
    with pytest.raises(ValueError, match="holds results of another"):
        repair(remove_blocks(original, [0]), original, samples[1:], partial=tmp_path / "partial")


def test_hidden_states_in_a_file_make_the_same_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    original, samples = tiny_model("llama"), random_text(40)
    in_memory, spilled = remove_blocks(original, [1]), remove_blocks(original, [1])
    expected = repair(in_memory, original, samples)

    opened: list[SpilledStates] = []
    keep = Shelf.keep

    def watching(self: Shelf, tensor: torch.Tensor) -> Held:
        opened.append(self._states)
        return keep(self, tensor)

    monkeypatch.setattr(Shelf, "keep", watching)
    monkeypatch.setattr("blockspin.repairs.shelf.available_memory", lambda: 2000)
    assert repair(spilled, original, samples) == expected
    assert same(weights_of(in_memory), weights_of(spilled))
    assert opened[-1].in_file > 0
    tokens, width = sum(map(len, samples)), 32
    assert opened[-1].in_file < COPIES * tokens * width * 4 * 1.3  # with padding; dropped room is used again

    monkeypatch.setattr("blockspin.model.spill.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"smaller --batch-size, or a folder on a larger disk"):
        repair(remove_blocks(original, [1]), original, samples)


def test_a_model_without_out_projections_is_left_alone() -> None:
    original = tiny_model("gemma2")
    smaller = remove_blocks(original, [1])
    before = weights_of(smaller)
    report = repair(smaller, original, random_text(), reading_ridge=None)
    assert report.steps == ()
    assert report.untouched == (0, 2, 3)
    assert same(before, weights_of(smaller))


def test_in_projections_alone_are_repaired_where_norms_follow_the_others() -> None:
    original = tiny_model("gemma2")
    smaller = remove_blocks(original, [1])
    before = weights_of(smaller)
    report = repair(smaller, original, random_text(64))
    changed = {name for name, tensor in weights_of(smaller).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert changed <= {f"model.layers.{i}.{name}.weight" for i in (1, 2) for name in GEMMA_READS}
    assert report.kl_after < report.kl_before
    assert report.untouched == (0, 2, 3)
    assert "out-projections of the blocks 0, 2, 3 stay as they are" in report.summary()
    assert "a norm behind the map" in report.summary()


def test_experts_are_left_alone_and_that_is_said() -> None:
    original = tiny("nemotron_h")
    smaller = remove_blocks(original, [0])
    routed = [name for name in weights_of(smaller) if ".experts." in name]
    before = weights_of(smaller)
    repair(smaller, original, random_text(64))
    assert routed
    assert all(torch.equal(before[name], smaller.state_dict()[name]) for name in routed)


def test_bad_input_is_refused() -> None:
    original, samples = tiny_model("llama"), random_text(64)
    smaller = remove_blocks(original, [1])
    with pytest.raises(ValueError, match=r"no block is gone"):
        repair(original, smaller, samples)
    with pytest.raises(ValueError, match=r"different token embeddings"):
        repair(smaller, tiny_model("llama", seed=1), samples)
    with pytest.raises(ValueError, match=r"block 1 of the shortened model has other weights than block 1"):
        repair(smaller, original, samples, removed=[2])
    with pytest.raises(ValueError, match=r"has 2 blocks, but the shortened model 3"):
        repair(smaller, original, samples, removed=[1, 2])
    with pytest.raises(ValueError, match=r"30 tokens .* 48 inputs needs at least 96"):
        repair(smaller, original, random_text(4, 12, seed=2)[:5])
    with pytest.raises(ValueError, match=r"two samples or more"):
        repair(smaller, original, samples[:1])

    assert mean_loss(smaller, samples) > 0
    repair(smaller, original, samples)
    with pytest.raises(ValueError, match=r"was repaired or trained already"):
        repair(smaller, original, samples)


def test_weights_that_are_not_finite_are_refused() -> None:
    original = tiny_model("llama")
    smaller = remove_blocks(original, [1])
    with torch.no_grad():
        smaller.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.2.mlp.down_proj.weight of the shortened model are not finite"):
        repair(smaller, original, random_text(64))


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    original = tiny_model("llama")
    smaller = remove_blocks(original, [1], copy=False)
    with torch.no_grad():  # of both: they share the weights, which are finite, and what they compute is not
        original.model.layers[2].mlp.up_proj.weight.mul_(1e30)
        original.model.layers[2].mlp.gate_proj.weight.mul_(1e30)
    with pytest.raises(ValueError, match=r"--dtype float32"):
        repair(smaller, original, random_text(64))


def test_a_repair_costs_few_passes_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole model one, of the shortened one for each addition, for in-projections behind one, and to go on."""
    original, samples = tiny_model("llama"), random_text(64)
    smaller, tokens_run = remove_blocks(original, [1]), 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal tokens_run
        tokens_run += args[0].shape[:2].numel()

    for model in (original, smaller):
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(count)
    report = repair(smaller, original, samples, batch_size=8)
    embedding = 2 / 4  # a block of four for each model
    assert report.passes == pytest.approx(1 + 4 * 3 / 4 + embedding, abs=0.3)  # and a comparison on held-out samples

    tokens = sum(batch.token_ids.numel() for batch in make_batches(samples, 8))  # with padding
    blocks = 4
    assert tokens_run / (tokens * blocks) == pytest.approx(report.passes, rel=0.1)


def test_batches_keep_held_out_samples_apart() -> None:
    samples = random_text(32)
    text = Text(samples, 5, seed=3)
    assert len(text.held_out) == 2
    fitted = held = 0
    for batch in make_batches(samples, 5):
        train_mask, held_mask = text.masks(batch)
        assert not (train_mask & held_mask).any()
        fitted, held = fitted + int(train_mask.sum()), held + int(held_mask.sum())
    assert fitted == text.num_tokens
    assert held == sum(map(len, text.held_out))
