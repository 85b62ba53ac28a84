"""The memory that a run takes at most, beside its libraries: for gradients, measured removals or the repair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..config import GRADIENT_ENERGIES, CompressConfig
from ..memory import available_memory, states_limit
from ..model.batches import Room, input_device, make_batches
from ..model.blocks import count_numbers
from ..model.head import CHUNK_BYTES, LOGIT_COPIES
from ..model.largest_batch import kept_bytes, tokens_that_fit
from ..model.offload import offloaded_tensors
from ..model.streaming import STATES_SHARE
from ..model.tracing import TracedModel
from ..repairs.fitting import HELD_OUT
from ..repairs.least_squares import bytes_of_sums
from ..repairs.own_share import own_share
from ..repairs.shelf import COPIES
from .stages import Samples

FLOAT = 4  # bytes


def memory_of_run(config: CompressConfig, traced: TracedModel, samples: Samples, left: float) -> int:
    """Bytes of weights, logits, hidden states, what a backward pass needs and a repair's sums, where they are most.

    left: the share of the parameters that a removal leaves.
    """
    every = [*samples.calibration, *samples.selection, *samples.evaluation]
    batch = make_batches(every, config.batch_size)[0].token_ids.numel()  # tokens
    measuring = _of_sweeps(traced, samples) if traced.is_offloaded else _of_passes(traced, batch)
    repairing = _of_repair(config, traced, samples, left, batch) if config.repair else 0.0
    gradients = _of_gradients(config, traced, samples) if config.energy in GRADIENT_ENERGIES else 0.0
    return int(max(measuring + _of_logits(traced, batch), gradients, repairing))


def _of_passes(traced: TracedModel, batch: int) -> float:
    """The weights, the states of a batch where passes branch, and those that leave the decoder. batch: its tokens."""
    kept = FLOAT * traced.depth * batch * width_of(traced)
    return bytes_of(traced.model) + 2 * min(states_limit(input_device(traced.model)), kept)


def _of_gradients(config: CompressConfig, traced: TracedModel, samples: Samples) -> float:
    """The weights, the logits, and what the blocks keep of the largest batch for its backward pass."""
    longest = make_batches(samples.calibration, config.batch_size)[0]
    fitting = tokens_that_fit(traced.model, backward=config.keeps_activations)
    batch = Room(fitting).cut([longest])[0].token_ids.numel()  # tokens
    checkpointing = config.gradient_checkpointing or batch > fitting
    return bytes_of(traced.model) + batch * kept_bytes(traced.model, checkpointing) + _of_logits(traced, batch)


def _of_sweeps(traced: TracedModel, samples: Samples) -> float:
    """What is not a block, two blocks, one that runs and one that is read, and the states that share a sweep."""
    states = (traced.depth + 2) * state_bytes(traced, samples.calibration)
    return _beside_blocks(traced) + 2 * _largest_block(traced) + min(states, STATES_SHARE * available_memory())


def _of_repair(config: CompressConfig, traced: TracedModel, samples: Samples, left: float, batch: int) -> float:
    """The most of three moments. batch: its tokens.

    - Blocks are fitted: both models, new weights beside the old ones, states of both, sums of the widest linear map.
    - Held-out text is measured, before and after: the same weights, and logits.
    - The result is proven: both models, and the repaired one once more.

    Of a model whose blocks are offloaded only what is not a block counts, and one block.
    """
    whole = bytes_of(traced.model)
    if traced.is_offloaded:
        weights = 2.0 * (_beside_blocks(traced) + _largest_block(traced))
        proof = 1.5 * weights
    else:
        weights = (1 + left) * whole + left * bytes_of_matrices(traced)
        proof = (1 + 2 * left) * whole

    text = [*samples.calibration, *samples.selection]
    more = 1 / (1 - own_share(traced.model, config.own_text))  # with the text that the model writes
    states = COPIES * more * state_bytes(traced, text)
    fitting = min(states, STATES_SHARE * available_memory()) + _bytes_of_sums(traced)
    held_out = max(max(map(len, text)), int(HELD_OUT * more * sum(map(len, text))))  # tokens
    return max(weights + fitting, weights + _of_logits(traced, min(batch, held_out)), proof)


def _of_logits(traced: TracedModel, tokens: int) -> float:
    """What is made of the logits of so many tokens, a chunk of them at a time."""
    model: Any = traced.model  # a module, which is not typed as a language model
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    return LOGIT_COPIES * min(CHUNK_BYTES, FLOAT * tokens * vocabulary)


def bytes_of(module: nn.Module) -> int:
    """Of the parameters of a module, as they are in memory."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def bytes_of_matrices(traced: TracedModel) -> int:
    """Of the matrices of all blocks, at most what a repair changes: as wide as they are in memory."""
    numbers = sum(count_numbers(weight) for weight in traced.layers.parameters() if weight.ndim == 2)
    element: int = traced.model.get_input_embeddings().weight.element_size()  # type: ignore[operator]
    return numbers * element


def state_bytes(traced: TracedModel, samples: Sequence[Tensor]) -> int:
    """Of the hidden states of samples at one block."""
    return FLOAT * width_of(traced) * sum(map(len, samples))


def width_of(traced: TracedModel) -> int:
    """Of the hidden states."""
    width: int = traced.model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
    return width


def _beside_blocks(traced: TracedModel) -> int:
    """Bytes of what is not a block."""
    inside = {id(p) for p in traced.layers.parameters()}
    return sum(p.numel() * p.element_size() for p in traced.model.parameters() if id(p) not in inside)


def _largest_block(traced: TracedModel) -> int:
    """Bytes of the largest block whose weights are offloaded."""
    return max(sum(tensor.num_bytes for tensor in offloaded_tensors(layer)) for layer in traced.layers)


def _bytes_of_sums(traced: TracedModel) -> int:
    """Of the sums of the widest linear map into the residual stream, and of their solution."""
    width = width_of(traced)
    widest = 0
    for parameter in traced.layers.parameters():
        if parameter.ndim == 2 and width in parameter.shape:
            widest = max(widest, *parameter.shape)
    return bytes_of_sums(widest, width)
