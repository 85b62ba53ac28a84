"""A model compressed within less memory than its weights take, next to the same run in memory.

python benchmarks/streaming.py [--layers 24] [--width 2048] [--limit-gib 2] [--repair] [--folder DIR] [--tiny]

A Llama of random weights in float32 is compressed twice, each time by `compress` in a fresh process: in memory, and
with --stream in a control group that is killed beyond the limit (Linux, as root). The files must be equal; with
--repair those of the repaired model too, which needs more text (--samples 12 --length 128 for a width of 512). Stage by
stage the times stand side by side, with the sweeps that were made and what one reading of the weights takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as tf
from safetensors.torch import save_file

from blockspin.config import CompressConfig
from blockspin.demo import CALIBRATION, MODEL
from blockspin.machine import describe_machine
from blockspin.model import offload, streaming
from blockspin.pipeline import compress as run_module
from blockspin.tables import Column, Table, short

GROUPS = Path("/sys/fs/cgroup")
# The functions of a run that are timed, and what they do.
STAGES = {
    "load_as": "loading",
    "energies_stage": "energies",
    "selection_stage": "choice",
    "checkpoint_stage": "checkpoint",
    "evaluate_removals": "evaluation",
    "repair_stage": "repair",
}


def make_model(folder: Path, layers: int, width: int) -> None:
    """A Llama of random weights, a shard for each layer, with the tokenizer of the embedded model."""
    tokenizer = tf.AutoTokenizer.from_pretrained(MODEL)
    config = tf.LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        dtype="float32",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = tf.AutoModelForCausalLM.from_config(config).state_dict()

    shards: dict[str, dict[str, torch.Tensor]] = {}  # name of a file -> tensors without content
    for name, tensor in shapes.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tensor

    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for file, tensors in shards.items():
        drawn = {}
        for name, tensor in tensors.items():
            spread = 1 / math.sqrt(tensor.shape[-1])
            one = torch.ones(tensor.shape)
            drawn[name] = one if tensor.ndim == 1 else torch.randn(tensor.shape, generator=generator) * spread
            weight_map[name] = file
        save_file(drawn, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(folder: Path, stream: bool, samples: int, length: int, batch_size: int, repair: bool) -> None:
    """Compress the model into `in-memory` or `streamed` beside it, and write what it took to a file there."""
    sweeps = 0
    counted = offload.resident_in_turn
    taken: dict[str, Any] = {}

    def counting(modules: Any) -> Any:
        nonlocal sweeps
        sweeps += 1
        return counted(modules)

    def clocked(name: str) -> Callable[..., Any]:
        function = getattr(run_module, name)

        def clocking(*arguments: Any, **options: Any) -> Any:
            started, used = time.perf_counter(), time.process_time()
            result = function(*arguments, **options)
            taken[STAGES[name]] = (time.perf_counter() - started, time.process_time() - used)
            return result

        return clocking

    out = folder.with_name("streamed" if stream else "in-memory")
    config = CompressConfig(
        str(folder),
        str(CALIBRATION),
        remove=6,
        energy="secant",
        energy_samples=samples,
        selection_samples=samples,
        evaluation_samples=samples,
        max_length=length,
        batch_size=batch_size,
        budget=6,
        max_candidates=6,
        repair=repair,
        own_text=0,
        choose_repaired=False,
        stream=stream,
        device_map=None if stream else "cpu",
    )
    with ExitStack() as patches:
        patches.enter_context(patch.object(streaming, "resident_in_turn", counting))
        for name in STAGES:
            patches.enter_context(patch.object(run_module, name, clocked(name)))
        run_module.compress(config, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    taken |= {"sweeps": sweeps, "peak": peak}
    (out / "taken.json").write_text(json.dumps(taken))


def reading(folder: Path) -> tuple[float, float]:
    """Seconds, and those of the processor, that one reading of the weights takes, block by block as a sweep does it."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, device_map=places(folder))
    started, used = time.perf_counter(), time.process_time()
    for layer in model.model.layers:
        offload.load_weights(layer)
    return time.perf_counter() - started, time.process_time() - used


def places(folder: Path) -> dict[str, str]:
    """A device map with the layers on disk."""
    layers = tf.AutoConfig.from_pretrained(folder).num_hidden_layers
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return rest | {f"model.layers.{i}": "disk" for i in range(layers)}


def child(mode: str, given: argparse.Namespace, limit: int | None = None) -> None:
    """Run a mode of this script with these arguments in a fresh process, within a limit in bytes.

    Raises:
        RuntimeError: it failed, or was killed for its memory.
    """
    group = make_group(limit) if limit else None

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, __file__, "--mode", mode, "--folder", str(given.folder)]
    for name in ("samples", "length", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    command += ["--repair"] if given.repair else []
    done = subprocess.run(command, preexec_fn=join)
    if group is not None:
        group.rmdir()
    if done.returncode:
        raise RuntimeError(f"the run {mode} ended with {done.returncode}")


def make_group(limit: int) -> Path:
    """A control group whose processes have so many bytes of memory, without swap."""
    version_1 = (GROUPS / "memory").is_dir()
    group = (GROUPS / "memory" if version_1 else GROUPS) / f"blockspin-benchmark-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
    return group


def equal_files(folder: Path) -> bool:
    """Whether both runs made the same energies, choice, losses, checkpoint and, where there is one, repaired model."""
    found = []
    for name in ("in-memory", "streamed"):
        out = folder.with_name(name)
        selection = json.loads((out / "candidates.json").read_text())
        selection.pop("seconds")
        losses = [row["sample_losses"] for row in json.loads((out / "evaluation.json").read_text())]
        files = [*(out / "checkpoint").glob("*.safetensors"), *(out / "repaired").glob("*.safetensors")]
        weights = [path.read_bytes() for path in sorted(files)]
        found.append((selection, losses, (out / "energies.safetensors").read_bytes(), weights))
    return found[0] == found[1]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--layers", type=int, default=24)
    arguments.add_argument("--width", type=int, default=2048)
    arguments.add_argument("--samples", type=int, default=4)
    arguments.add_argument("--length", type=int, default=32)
    arguments.add_argument("--batch-size", type=int, default=4)
    arguments.add_argument("--limit-gib", type=float, default=2)
    arguments.add_argument("--repair", action="store_true", help="repair the smaller model as well")
    arguments.add_argument("--folder", type=Path, default=Path("streaming-benchmark"))
    arguments.add_argument("--tiny", action="store_true", help="a model of a few kB, without a limit")
    arguments.add_argument("--mode", choices=("in-memory", "streamed", "reading"))
    given = arguments.parse_args()

    model = given.folder / "model"
    if given.mode == "reading":
        (given.folder / "reading.json").write_text(json.dumps(reading(model)))
        return
    if given.mode:
        run(model, given.mode == "streamed", given.samples, given.length, given.batch_size, given.repair)
        return

    if not model.is_dir():
        model.mkdir(parents=True)
        make_model(model, 8 if given.tiny else given.layers, 64 if given.tiny else given.width)
    for name in ("in-memory", "streamed"):
        shutil.rmtree(given.folder / name, ignore_errors=True)
    limit = None if given.tiny else int(given.limit_gib * 2**30)
    child("reading", given, limit)
    child("in-memory", given)
    child("streamed", given, limit)

    taken = {}
    for name in ("in-memory", "streamed"):
        taken[name] = json.loads((given.folder / name / "taken.json").read_text())
    rows = []
    for stage in STAGES.values():
        if stage not in taken["in-memory"]:
            continue
        cells = [stage]
        for clock in (0, 1):
            plain, streamed = (taken[name][stage][clock] for name in taken)
            cells += [f"{plain:.1f}", f"{streamed:.1f}", f"{streamed / plain:.2f}"]
        rows.append(cells)
    columns = [Column("stage", words=True)]
    for unit in ("s", "s of the processor"):
        columns += [Column(f"in memory, {unit}"), Column(f"streamed, {unit}"), Column("ratio")]
    print(Table(columns, rows).text())
    print("Peak memory: " + ", ".join(f"{name} {short(taken[name]['peak'], 'B')}" for name in taken))

    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    once = json.loads((given.folder / "reading.json").read_text())
    print(
        f"{short(size, 'B')} of weights; a reading takes {once[0]:.1f} s, {once[1]:.1f} s of the processor; "
        f"{taken['streamed']['sweeps']} sweeps."
    )
    print("The files are equal." if equal_files(model) else "The files DIFFER.")
    print(", ".join(describe_machine().values()))


if __name__ == "__main__":
    main()
