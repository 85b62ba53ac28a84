"""Throughput and memory of `estimate_gradients` against the floor: a forward and a backward pass without any gates.

    python benchmarks/gradients.py                                     # the embedded model
    python benchmarks/gradients.py --config llama-3.1-8b --length 1024  # random weights in bfloat16, on a GPU

The floor runs the same batches forward and backward through the activations down to the embeddings, without parameter
gradients. Both take turns in one process. Memory is the peak of the GPU; on a CPU it is the bytes of the tensors that
autograd keeps for the backward pass, counted one by one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from blockspin.demo import MODEL
from blockspin.energies.gradients import gate_gradients
from blockspin.model.batches import Batch, frozen, input_device, make_batches
from blockspin.model.tracing import trace_model

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def floor_pass(model: nn.Module, batch: Batch) -> None:
    """One forward and one backward pass through the activations only."""
    token_ids = batch.token_ids.to(input_device(model))
    embedded = model.get_input_embeddings()(token_ids).detach().requires_grad_(True)  # type: ignore[operator]
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    labels = batch.token_ids[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    torch.autograd.backward(losses.sum() / labels.shape[1])


def seconds_of(run: Callable[[Batch], object], batches: Sequence[Batch]) -> float:
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def memory_of(run: Callable[[Batch], object], batch: Batch, model: nn.Module) -> int:
    """Bytes: above the weights at the peak on a GPU; kept for the backward pass on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(batch)
        return torch.cuda.max_memory_allocated() - before

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}  # storage -> its bytes

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(batch)
    return sum(kept.values())


def matrix_peak(model: nn.Module) -> float:
    """FLOP/s of a large matrix product in the model's dtype on its device."""
    weight = next(model.parameters())
    n = 8192 if weight.is_cuda else 1024
    a, b = torch.randn(2, n, n, dtype=weight.dtype, device=weight.device)  # (n, n) each

    times = []
    for _ in range(8):
        started = time.perf_counter()
        (a @ b)[0, 0].item()
        times.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(times[3:])  # the first ones warm up


def open_model(name: str) -> PreTrainedModel:
    """The embedded model, or one of random weights of this configuration."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if name == "embedded":
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16)


def multiplied(model: PreTrainedModel) -> int:
    """The parameters that a token is multiplied with: all but an embedding that is only looked up."""
    number: int = sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    looked_up: int = 0 if embedding is head else embedding.numel()
    return number - looked_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["embedded", "llama-3.1-8b"], default="embedded")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    arguments = parser.parse_args()

    model = open_model(arguments.config)
    traced = trace_model(model)
    samples = torch.randint(model.config.vocab_size, (arguments.batch_size, arguments.length))
    batches = make_batches(list(samples), arguments.batch_size) * arguments.batches

    def ours(batch: Batch) -> object:
        return gate_gradients(traced, batch)

    def floor(batch: Batch) -> None:
        floor_pass(model, batch)

    seconds, floor_seconds, ratios = [], [], []
    with frozen(model):
        seconds_of(ours, batches[:1])  # warms up
        seconds_of(floor, batches[:1])
        for _ in range(arguments.rounds):
            seconds.append(seconds_of(ours, batches))
            floor_seconds.append(seconds_of(floor, batches))
            ratios.append(floor_seconds[-1] / seconds[-1])
        memory = memory_of(ours, batches[0], model), memory_of(floor, batches[0], model)

    tokens = samples.numel() * len(batches)
    typical = statistics.median(seconds)
    numbers = {
        "model": arguments.config,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "batch": [arguments.batch_size, arguments.length],
        "tokens_per_second": tokens / typical,
        "floor_tokens_per_second": tokens / statistics.median(floor_seconds),
        "throughput_ratio": statistics.median(ratios),
        "memory_bytes": memory[0],
        "floor_memory_bytes": memory[1],
        "memory_ratio": memory[0] / memory[1],
        # forward and backward through the activations: 4 operations a parameter and token
        "share_of_matrix_peak": 4 * multiplied(model) * tokens / typical / matrix_peak(model),
        "seconds_for_2048_samples": 2048 * arguments.length * typical / tokens,
    }
    print(json.dumps(numbers, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
