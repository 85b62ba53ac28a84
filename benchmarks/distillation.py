"""Throughput and peak memory of distillation: training steps of a shortened model with its teacher, random weights.

    python benchmarks/distillation.py                                              # a small model, large vocabulary
    python benchmarks/distillation.py --config llama-3.1-8b --remove 8 --length 1024 --batch 16 \
        --gradient-checkpointing --peak-tflops 989                                 # on a GPU; teacher in NF4

Each row is a process of its own: with the logits in chunks, and with the logits of all tokens at once. Memory is the
peak of the GPU, or of the process on a CPU above what it held with the models loaded. The share of the matrix peak
counts 6 operations a token for each weight of the student's matrices and 2 for the teacher's, and nothing twice.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from gradients import LLAMA_8B
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from blockspin.distillation.run import distill
from blockspin.model.loading import load_model
from blockspin.surgery.memory import remove_blocks
from blockspin.training import DistillConfig

CONFIGS = {
    "tiny": {
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "small": {
        "vocab_size": 32000,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "llama-3.1-8b": LLAMA_8B,
}


def random_model(name: str, remove: int, quantised: bool) -> PreTrainedModel:
    """Random weights, in bfloat16 on a GPU; quantised as they would be from disk."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIGS[name]), dtype=dtype)

    if remove:
        model = remove_blocks(model, range(2, 2 + remove))

    if quantised:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = load_model(folder, quantization="nf4")
    return model


def matrix_weights(name: str, removed: int) -> int:
    """Weights that a token is multiplied with: all but norms and the embedding."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIGS[name]))

    layers = model.model.layers
    one = 0  # layer's matrices
    for parameter in layers[0].parameters():
        if parameter.ndim == 2:
            one += parameter.numel()
    return int(one * (len(layers) - removed) + model.lm_head.weight.numel())


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def warm_up() -> None:
    """Load what the Trainer loads, so that it is not counted."""
    student, teacher = random_model("tiny", 0, False), random_model("tiny", 0, False)
    samples = list(torch.zeros((2, 8), dtype=torch.int64))
    distill(student, teacher, samples, samples[:1], config=DistillConfig(max_length=8, max_steps=1, batch_size=1))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens/s of the last reported steps, and the peak of the memory."""
    quantised = torch.cuda.is_available() and arguments.teacher_quantization == "nf4"
    teacher = random_model(arguments.config, 0, quantised)
    student = random_model(arguments.config, arguments.remove, False)
    config = DistillConfig(
        max_length=arguments.length,
        batch_size=arguments.batch,
        max_steps=arguments.steps,
        log_steps=max(1, arguments.steps // 2),  # the first half warms up
        chunk_tokens=arguments.chunk_tokens,
        gradient_checkpointing=arguments.gradient_checkpointing,
    )

    vocabulary = student.config.vocab_size
    samples = list(torch.randint(0, vocabulary, (arguments.steps * arguments.batch, arguments.length)))
    warm_up()
    loaded = 0 if torch.cuda.is_available() else peak_bytes()
    result = distill(student, teacher, samples, samples[:1], config=config)

    speeds = [row["tokens_per_second"] for row in result.history if "tokens_per_second" in row]
    return {"tokens_per_second": speeds[-1], "peak_bytes": peak_bytes() - loaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["small", "llama-3.1-8b"], default="small")
    parser.add_argument("--remove", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--chunk-tokens", type=int, default=128)
    parser.add_argument("--teacher-quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="matrix peak of the device, for the share that is reached")
    parser.add_argument("--out", help="write one measurement to this file, and do no other")
    arguments = parser.parse_args()

    if arguments.out:
        Path(arguments.out).write_text(json.dumps(measure(arguments)))
        return

    # Operations a token.
    operations = 6 * matrix_weights(arguments.config, arguments.remove) + 2 * matrix_weights(arguments.config, 0)
    with tempfile.TemporaryDirectory() as folder:
        for tokens in (arguments.chunk_tokens, arguments.batch * arguments.length):
            out = Path(folder) / f"{tokens}.json"
            again = [sys.executable, __file__, *sys.argv[1:], "--chunk-tokens", str(tokens), "--out", str(out)]
            subprocess.run(again, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

            row = json.loads(out.read_text())
            line = f"{tokens:>6} tokens' logits at a time: {row['tokens_per_second']:,.0f} tokens/s, "
            line += f"peak {row['peak_bytes'] / 2**30:.2f} GiB"
            if arguments.peak_tflops:
                share = row["tokens_per_second"] * operations / (1e12 * arguments.peak_tflops)
                line += f", {share:.1%} of the matrix peak"
            print(line)


if __name__ == "__main__":
    main()
