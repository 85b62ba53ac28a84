"""ReplaceMe, LinearPatch and Ghosted Layers against their formulas on activations gathered by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import random_samples, tiny_model
from torch import Tensor, nn

from blockspin.baselines import ghosted_layers, linear_patch, replaceme
from blockspin.baselines.linear import _rotation
from blockspin.surgery.memory import remove_blocks

Repair = Callable[[nn.Module, nn.Module, list[Tensor]], None]
SAMPLES = random_samples((40, 33, 38, 36, 40, 31))


def entering(model: nn.Module, block: int) -> Tensor:
    """(tokens, width): what enters a block."""
    with torch.no_grad():
        states = [model(input_ids=sample[None], output_hidden_states=True).hidden_states[block] for sample in SAMPLES]
    return torch.cat([state[0] for state in states]).double()


def mlp_output(model: Any, block: int) -> Tensor:
    """(tokens, width): what the MLP of a block of a Llama brings."""
    seen: list[Tensor] = []
    handle = model.model.layers[block].mlp.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        for sample in SAMPLES:
            model(input_ids=sample[None])
    handle.remove()
    return torch.cat(seen).double()


def test_replaceme_folds_the_least_squares_map() -> None:
    original = tiny_model("llama")
    smaller = remove_blocks(original, [2])
    replaceme(smaller, original, SAMPLES, batch_size=4)

    m, left, wanted = mlp_output(original, 1), entering(original, 2), entering(original, 3)
    transform = torch.linalg.lstsq(m, wanted - (left - m)).solution
    old, new = (model.model.layers[1].mlp.down_proj.weight.double() for model in (original, smaller))
    torch.testing.assert_close(new, transform.T @ old, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(smaller.model.layers[2].state_dict(), original.model.layers[3].state_dict())


def test_the_cosine_variant_lowers_the_cosine_distance() -> None:
    original = tiny_model("llama")
    wanted = entering(original, 3)

    def distance(model: nn.Module) -> float:
        return float(1 - nn.functional.cosine_similarity(entering(model, 2), wanted).mean())

    plain = remove_blocks(original, [2])
    mended = remove_blocks(original, [2])
    replaceme(mended, original, SAMPLES, cosine=True)
    assert distance(mended) < distance(plain)


def test_ghosted_layers_put_the_least_squares_map_in_the_place() -> None:
    original = tiny_model("llama")
    smaller = remove_blocks(original, [2])
    ghosted_layers(smaller, original, SAMPLES, batch_size=4)
    left, wanted = entering(original, 2), entering(original, 3)
    expected = left @ torch.linalg.lstsq(left, wanted).solution
    torch.testing.assert_close(entering(smaller, 2), expected, rtol=1e-2, atol=1e-2)


def test_linear_patch_scales_rotated_channels() -> None:
    original = tiny_model("llama")
    smaller = remove_blocks(original, [2])
    linear_patch(smaller, original, SAMPLES, batch_size=4)
    left, wanted = entering(original, 2), entering(original, 3)
    rotation = _rotation(32).double()
    scale = (wanted @ rotation).abs().mean(0) / (left @ rotation).abs().mean(0)
    torch.testing.assert_close(entering(smaller, 2), left @ rotation * scale @ rotation.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [32, 96, 576])
def test_rotations_are_orthogonal(width: int) -> None:
    rotation = _rotation(width)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width), rtol=0, atol=1e-5)
    if width == 32:
        torch.testing.assert_close(rotation.abs(), torch.full((32, 32), 32**-0.5))


@pytest.mark.parametrize("mend", [replaceme, ghosted_layers, linear_patch])
def test_a_block_that_did_nothing_needs_no_repair(mend: Repair) -> None:
    original = tiny_model("llama")
    with torch.no_grad():
        original.model.layers[2].self_attn.o_proj.weight.zero_()
        original.model.layers[2].mlp.down_proj.weight.zero_()
    smaller = remove_blocks(original, [2])
    mend(smaller, original, SAMPLES)
    with torch.no_grad():
        expected = original(input_ids=SAMPLES[0][None]).logits
        torch.testing.assert_close(smaller(input_ids=SAMPLES[0][None]).logits, expected, rtol=1e-3, atol=1e-3)
