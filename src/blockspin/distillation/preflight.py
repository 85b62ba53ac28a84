"""What a training needs, checked before anything is loaded or written: models that fit each other, and memory."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import INTEGRATION_TO_CALLBACK

from .. import memory
from ..errors import first_line
from ..model.blocks import count_parameters
from ..model.generation import check_generates
from ..model.loading import context_length, load_config, load_tokenizer, local_folder, model_without_weights
from ..surgery.provenance import kept_blocks_of
from ..tables import short
from ..training import DistillConfig
from .activations import activation_bytes

GIB = 2**30  # bytes
NF4_BYTES = 0.56  # of a weight: 4 bits, and a float32 for each 64 weights
HELD_LOGITS = 6  # tensors of the size of a chunk's logits that are held at once, in float32


def check_training(student: Path, config: DistillConfig, state: PartialState) -> PreTrainedTokenizerBase:
    """Refuse a training that must fail, before anything is loaded; returns the tokenizer.

    Raises:
        ValueError: what is wrong.
    """
    remote = config.trust_remote_code
    check_requirements(config)

    ours = load_config(student, trust_remote_code=remote)
    theirs = load_config(config.the_teacher, trust_remote_code=remote)
    check_pair(ours, theirs, config.max_length)
    tokenizer = load_tokenizer(student, trust_remote_code=remote)
    if tokenizer.get_vocab() != load_tokenizer(config.the_teacher, trust_remote_code=remote).get_vocab():
        raise ValueError("the vocabularies differ: the tokenizers of student and teacher give tokens other numbers")

    # The models without their weights: what has the wrong size is told before they are loaded.
    models = {
        "student": model_without_weights(ours, trust_remote_code=remote),
        "teacher": model_without_weights(theirs, trust_remote_code=remote),
    }
    sizes = {name: count_parameters(model) for name, model in models.items()}
    check_sizes(sizes["student"], sizes["teacher"])

    if hasattr(ours, "quantization_config"):
        raise ValueError("the student is quantised; shorten the original in full precision and train that")
    option = needs_kept_blocks(config)
    if option is not None and kept_blocks(student, config) is None:
        raise ValueError(f"{student} has no blockspin.json that tells which blocks of the teacher were kept ({option})")
    if sizes["student"] == sizes["teacher"] and student.resolve() == local_folder(config.the_teacher).resolve():
        raise ValueError(f"{student} is student and teacher; give a shortened model first, the original as --teacher")

    # What is asked of the models must be possible with them, or with a shard of them.
    sharded = _is_sharded()
    if sharded:
        _check_with_shards(config)
    writes = {"student": bool(config.on_policy), "teacher": config.self_generated is not None}
    for name, model in models.items():
        if writes[name]:
            check_generates(model, "leave out --self-generated and --on-policy")

    activations = activation_bytes(models["student"], weight_bytes(config), config.gradient_checkpointing)
    vocabulary = ours.get_text_config(decoder=True).vocab_size
    shards = state.num_processes if sharded else 1
    needed = memory_estimate(sizes["student"], sizes["teacher"], vocabulary, config, shards, activations)
    check_room(needed, free_memory())
    return tokenizer


def check_requirements(config: DistillConfig) -> None:
    """Refuse settings whose packages are not installed.

    Raises:
        ValueError: what to install.
    """
    needed = []
    if config.teacher_quantization == "nf4":
        needed.append(("--teacher-quantization nf4", "bitsandbytes"))
    if config.lora_rank is not None:
        needed.append(("--lora-rank", "peft"))

    for option, package in needed:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{option} needs {package}: pip install 'blockspin[distill]', or leave it out")

    for name in config.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"--report-to {name}: there is no such logger; choose from {known}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except Exception as error:  # each logger has its own way to say that its package is missing
            raise ValueError(f"--report-to {name}: {first_line(error)}") from error


def _is_sharded() -> bool:
    """Whether accelerate spreads the weights over processes."""
    return "true" in (os.environ.get("ACCELERATE_USE_FSDP"), os.environ.get("ACCELERATE_USE_DEEPSPEED"))


def _check_with_shards(config: DistillConfig) -> None:
    """Raise ValueError where a training needs a whole model, and each process has a shard."""
    if config.lora_rank is not None:
        raise ValueError("--lora-rank merges its adapters at the end, which needs the whole model: leave out FSDP")
    if config.on_policy:
        raise ValueError("--on-policy generates with the student, which needs the whole model: leave out FSDP")


def check_pair(student: PretrainedConfig, teacher: PretrainedConfig, length: int) -> None:
    """Refuse models that do not share a vocabulary, and samples that are longer than one of them can take.

    Raises:
        ValueError: what does not fit.
    """
    configs = {"student": student.get_text_config(decoder=True), "teacher": teacher.get_text_config(decoder=True)}
    ours, theirs = configs["student"].vocab_size, configs["teacher"].vocab_size
    if ours != theirs:
        raise ValueError(
            f"the vocabularies differ: {ours} tokens of the student, {theirs} of the teacher "
            "(--teacher); give the model that the student was made from"
        )

    for name, config in configs.items():
        longest = context_length(config)
        if longest is not None and length > longest:
            raise ValueError(f"the samples have {length} tokens and the {name} takes {longest}; lower --max-length")


def check_sizes(student: int, teacher: int) -> None:
    """Refuse a student of more parameters than its teacher: the two were taken for each other.

    Raises:
        ValueError: says so.
    """
    if student > teacher:
        raise ValueError(
            f"the student has {short(student)} parameters and the teacher {short(teacher)}: they were taken for each "
            "other; give the shortened model as the student and the original as the teacher (--teacher)"
        )


def check_room(needed: dict[str, float], free: float) -> None:
    """Refuse a training that does not fit into the memory of a device.

    needed: bytes by purpose.

    Raises:
        ValueError: it does not fit, with the estimate.
    """
    total = sum(needed.values())
    if total > free:
        parts = [f"{name} {number / GIB:.1f}" for name, number in needed.items()]
        raise ValueError(
            f"no room for both models: {total / GIB:.1f} GiB are needed ({', '.join(parts)}) and {free / GIB:.1f} GiB "
            "are free; try --gradient-checkpointing, a smaller --batch-size with more --gradient-accumulation, "
            "--lora-rank 64, --teacher-quantization nf4, or more GPUs with `accelerate launch --use_fsdp`"
        )


def weight_bytes(config: DistillConfig) -> int:
    """Bytes of a weight of the student."""
    narrow = config.dtype == "bfloat16" or (config.dtype == "auto" and torch.cuda.is_available())
    return 2 if narrow else 4


def memory_estimate(
    student: int, teacher: int, vocabulary: int, config: DistillConfig, shards: int, activations: float = 0.0
) -> dict[str, float]:
    """Bytes on each device for models of so many parameters, by purpose.

    shards: over how many devices the student, its gradients and the optimiser are spread.
    activations: bytes for each token (`activation_bytes`).
    """
    width = weight_bytes(config)
    unquantised = 2 if torch.cuda.is_available() else 4
    teacher_width = NF4_BYTES if config.teacher_quantization == "nf4" else unquantised
    everything = config.train == "all" and config.lora_rank is None
    trained = student if everything else 0  # a part of the weights is small beside them
    chunk = min(config.chunk_tokens, config.batch_size * config.max_length)  # tokens

    return {
        "student": student * width / shards,
        "gradients": trained * width / shards,
        "optimiser": 2 * trained * width / shards,
        "teacher": teacher * teacher_width,
        "activations": activations * config.batch_size * config.max_length,
        "logits": HELD_LOGITS * chunk * vocabulary * 4,
    }


def choose_quantization(config: DistillConfig) -> str:
    """nf4 or none: `auto` is nf4 where there are a GPU, bitsandbytes and a teacher that is not quantised already."""
    if config.teacher_quantization != "auto":
        return config.teacher_quantization

    found = torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None
    teacher = load_config(config.the_teacher, trust_remote_code=config.trust_remote_code)
    return "nf4" if found and not hasattr(teacher, "quantization_config") else "none"


def needs_kept_blocks(config: DistillConfig) -> str | None:
    """The option for which it must be known which blocks were kept, if there is one."""
    if config.hidden_states:
        return "--hidden-states"
    return "--train neighbours" if config.train == "neighbours" else None


def kept_blocks(student: Path, config: DistillConfig) -> list[int] | None:
    """Which blocks of the teacher the student's blocks are, where that is needed and blockspin.json tells it."""
    if needs_kept_blocks(config) is None:
        return None
    teacher = load_config(config.the_teacher, trust_remote_code=config.trust_remote_code)
    return kept_blocks_of(student, teacher.get_text_config(decoder=True).num_hidden_layers)


def free_memory() -> int:
    """Bytes that are free on this process's GPU; without one, its share of what the machine has free."""
    if torch.cuda.is_available():
        return memory.free_memory(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))
    return memory.free_memory(torch.device("cpu"))
