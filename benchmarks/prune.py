"""Speed and memory of shortening a checkpoint on disk, next to copying the same bytes.

python benchmarks/prune.py [--gib 4] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import save_file

PRUNE = """
import resource, sys, time
from blockspin.surgery import prune_checkpoint
start = time.perf_counter()
prune_checkpoint(sys.argv[1], [3, 7], sys.argv[2], progress=False)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def make_checkpoint(folder: Path, gib: float, shards: int = 4) -> None:
    """A Llama of 16 layers of about `gib` GiB in bfloat16, in several shards."""
    width = int((gib * 2**30 / 2 / 16 / 16) ** 0.5) // 64 * 64  # a layer has about 16 width^2 parameters
    config = tf.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=16,
        num_attention_heads=width // 64,
        vocab_size=256,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in tf.AutoModelForCausalLM.from_config(config).state_dict().items()}
    names = list(shapes)
    for number in range(shards):
        tensors = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in names[number::shards]}
        save_file(tensors, folder / f"model-{number + 1:05}-of-{shards:05}.safetensors", metadata={"format": "pt"})


def synchronised_copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder and have it on disk, which is what pruning promises too."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_checkpoint(folder / "whole", arguments.gib)
        shard = max(file.stat().st_size for file in (folder / "whole").iterdir()) / 2**30
        command = [sys.executable, "-c", PRUNE, str(folder / "whole"), str(folder / "short")]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, memory = map(float, answer.split())
        written = sum(file.stat().st_size for file in (folder / "short").iterdir()) / 2**30
        copied = synchronised_copy(folder / "short", folder / "copy")
    print(f"pruning:  {written:.2f} GiB written in {seconds:.1f} s, peak memory {memory:.2f} GiB with all libraries")
    print(f"          (allowed: a shard of {shard:.2f} GiB and 1 GiB)")
    print(f"copying:  the same in {copied:.1f} s; pruning runs at {copied / seconds:.2f} of its speed")


if __name__ == "__main__":
    main()
