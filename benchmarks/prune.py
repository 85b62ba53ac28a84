"""Speed and memory of shortening a checkpoint on disk, next to copying the same bytes.

python benchmarks/prune.py [--gib 4] [--pairs 6] [--folder DIR]

Both are timed until the bytes are on disk, each in a fresh process that has imported the same libraries, and each time
with nothing left to write from before: how fast a machine writes depends on what it did a moment ago. They take turns
in being first.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

from blockspin.surgery.checkpoint import prune_checkpoint


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
        weights = tf.AutoModelForCausalLM.from_config(config).state_dict()
    weight_map = {}  # name of a tensor -> its file
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        tensors = {}
        for name in list(weights)[number::shards]:
            tensors[name] = torch.ones(weights[name].shape, dtype=torch.bfloat16)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})

    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prune(source: Path, target: Path) -> tuple[float, float]:
    """Seconds, and the GiB of memory at the peak."""
    start = time.perf_counter()
    prune_checkpoint(source, [3, 7], target, progress=False)
    seconds = time.perf_counter() - start

    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    return seconds, int(peak[1]) / 2**20


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder and have it on disk, which is what pruning promises too."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def sizes(folder: Path) -> list[float]:
    """Of the files in a folder, in GiB."""
    return [file.stat().st_size / 2**30 for file in folder.iterdir()]


def in_fresh_process(function: Callable[..., Any], *arguments: Path) -> Any:
    os.sync()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4, help="size of the checkpoint")
    parser.add_argument("--pairs", type=int, default=6, help="how often each is timed (an even number)")
    parser.add_argument("--folder", help="where to write; the system's temporary folder by default")
    arguments = parser.parse_args()

    pruned, copied = [], []  # seconds
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        whole, short, target = folder / "whole", folder / "short", folder / "target"
        make_checkpoint(whole, arguments.gib)
        shard = max(sizes(whole))
        _, memory = in_fresh_process(prune, whole, short)
        written = sum(sizes(short))

        for pair in range(arguments.pairs):
            for pruning in (True, False) if pair % 2 == 0 else (False, True):
                if pruning:
                    pruned.append(in_fresh_process(prune, whole, target)[0])
                else:
                    copied.append(in_fresh_process(copy, short, target))
                shutil.rmtree(target)
            print(f"{written:.2f} GiB pruned in {pruned[-1]:.1f} s, copied in {copied[-1]:.1f} s", flush=True)

    ratio = statistics.median(copied) / statistics.median(pruned)
    print(f"pruning runs at {ratio:.2f} of the speed of copying (medians; the aim is at least 0.8)")
    print(f"peak memory {memory:.2f} GiB with all libraries (aim: at most a shard of {shard:.2f} GiB and 1 GiB)")


if __name__ == "__main__":
    main()
