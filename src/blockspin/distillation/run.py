"""Trains a shortened model to give the distribution of the original, its teacher."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..files import check_free, replacing, write_json, writing
from ..lock import locked
from ..model import fingerprint
from ..model.batches import frozen
from ..model.blocks import check_model, count_parameters
from ..model.generation import check_generates
from ..model.head import SplitModel
from ..model.loading import load_config, load_model, local_folder
from ..model.quantization import is_quantized
from ..model.weights import silenced
from ..processes import TIMEOUT, from_main
from ..progress import console
from ..settings import say
from ..surgery.card import add_training
from ..surgery.provenance import RECORD
from ..training import DistillConfig
from .data import Samples, cached, divided, packed
from .loss import DistillationLoss, split, training_forward
from .preflight import check_pair, check_sizes, check_training, choose_quantization, kept_blocks, needs_kept_blocks
from .trained import learning_rate, only_some_trained
from .trainer import DistillationTrainer, collate, training_arguments

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", ".*")


@dataclass(frozen=True)
class Distillation:
    """What a training has done.

    steps: optimiser steps. before, after: KL(teacher || student) in nats a token and the student's perplexity on the
    validation samples. history: the reports on the way, as the Trainer keeps them.
    """

    steps: int
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, float]]


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: Sequence[Tensor],
    validation: Sequence[Tensor],
    *,
    config: DistillConfig | None = None,
    kept: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> Distillation:
    """Train `student` in place to give the distribution of `teacher` for the next token (paper, step 4).

    samples, validation: 1-D int64 tensors of token ids, to train on and to measure.
    config: how to train; what it says of the teacher and of the data is not read.
    kept: for each block of the student its index in the teacher (needed where hidden states are compared).
    folder: where checkpoints are kept, and found again by a call that continues; None: nowhere.

    Raises:
        ValueError: the models do not fit each other or the samples, one is compiled, or the loss is not finite.
    """
    config = config or DistillConfig()
    for model in (student, teacher):
        check_model(model)
    check_pair(student.config, teacher.config, max(map(len, [*samples, *validation])))
    if not is_quantized(teacher):
        check_sizes(count_parameters(student), count_parameters(teacher))
    taught = {id(p) for p in teacher.parameters()}
    if any(id(p) in taught for p in student.parameters()):
        raise ValueError("student and teacher share weights, as after remove_blocks(copy=False); distil a copy")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        trainer, result = _train(
            student, teacher, teacher.config, Samples(samples), Samples(validation), config, kept, place
        )

    if config.lora_rank is not None:
        trainer.model.merge_and_unload()
    student.eval()
    return result


def distill_checkpoint(
    student: str | Path, out: str | Path, config: DistillConfig, *, leave_out: range = range(0)
) -> Distillation:
    """Train the model in the folder `student` with `config.teacher` on `config.data`; write it to the folder `out`.

    While it runs, the packed text and the latest checkpoint are in `<out>-training`; after an interruption the same
    call continues from there. The folder is removed when `out` is whole; TensorBoard's logs move to `<out>-logs`. `out`
    is a checkpoint of the same form and dtype as the student's, with its tokenizer and other files; its
    `blockspin.json` describes the training. If `accelerate launch` or `torchrun` starts several processes, they train
    one model.

    leave_out: numbers of samples of the data that must not be trained on, in the order of `load_calibration`.

    Raises:
        ValueError: the models, the data or the settings do not fit each other or the machine; nothing is written.
    """
    student, out = local_folder(student), Path(out)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    console.quiet = not state.is_main_process

    # Everything that can be refused is refused before anything is loaded or written.
    if config.teacher is None or config.data is None:
        raise ValueError("distillation needs a teacher and data (--teacher, --data)")
    config = replace(config, teacher_quantization=choose_quantization(config))
    finished = finished_training(out, student, config)
    if finished is not None:
        return finished
    check_free(out)

    tokenizer = check_training(student, config, state)
    say(config.unused())
    with locked(out), writing(out):
        return _train_checkpoint(student, out, config, leave_out, tokenizer, state)


def _train_checkpoint(
    student: Path,
    out: Path,
    config: DistillConfig,
    leave_out: range,
    tokenizer: PreTrainedTokenizerBase,
    state: PartialState,
) -> Distillation:
    """The training of `distill_checkpoint`, after its checks."""
    folder = out.with_name(f"{out.name}-training")
    load = cache(partial(_load_teacher, config, state))  # when it is first needed

    def text() -> Dataset[Any]:
        windows = packed(config, tokenizer, folder, student, leave_out, state.num_processes, load)
        return windows if config.cache_teacher is None else cached(windows, config, load)

    def write_text() -> None:
        text()

    # The main process writes what all read.
    if state.num_processes > 1:
        from_main(write_text)
    samples, validation = divided(text(), config.validation_split)

    # A teacher whose view is on disk does not train.
    teacher = load() if config.cache_teacher is None else None
    load.cache_clear()
    original = load_config(config.the_teacher, trust_remote_code=config.trust_remote_code)
    model, kept = _load_student(student, config), kept_blocks(student, config)
    trainer, result = _train(model, teacher, original, samples, validation, config, kept, folder)

    # All processes gather the weights, one writes them: in the dtype of the student's checkpoint.
    stored = load_config(student, trust_remote_code=config.trust_remote_code)
    weights = _merged_weights(model, trainer, config, getattr(stored, "dtype", None) or model.dtype)
    if state.is_main_process:
        _write(model, weights, student, out, result, config)
        logs = folder / "runs"  # of TensorBoard
        if logs.is_dir():
            shutil.copytree(logs, out.with_name(f"{out.name}-logs"), dirs_exist_ok=True)
        shutil.rmtree(folder)
    state.wait_for_everyone()
    return result


def finished_training(out: Path, student: Path, config: DistillConfig) -> Distillation | None:
    """What the same training wrote to `out` when it was done; None where there is something else."""
    try:
        about = json.loads((out / RECORD).read_text())["distillation"]
        history = json.loads((out / "distillation.json").read_text())
        stored = [about["student"], about["settings"]]
        result = Distillation(about["steps"], about["before"], about["after"], history)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    wanted = json.loads(json.dumps([fingerprint.of_model(student), asdict(config)]))
    return result if stored == wanted else None


def _train(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    teacher_config: PretrainedConfig,
    samples: Dataset[Any],
    validation: Dataset[Any],
    config: DistillConfig,
    kept: Sequence[int] | None,
    folder: Path,
) -> tuple[DistillationTrainer, Distillation]:
    """The trainer after all its steps, and what it measured. teacher: None where the samples bring its view."""
    option = needs_kept_blocks(config)
    if option is not None and kept is None:
        raise ValueError(f"{option} needs to know which blocks were kept (kept=, blockspin.json of the student)")
    if config.on_policy:
        check_generates(student, "leave out --on-policy")
    processes = PartialState(cpu=not torch.cuda.is_available()).num_processes
    steps = _steps(config, len(samples), processes)  # type: ignore[arg-type]
    if steps < config.max_steps != DistillConfig.max_steps:
        short = f"The data has only {steps} of the {config.max_steps} steps asked for"
        say([f"{short}; --num-epochs takes more passes over it, --batch-size fewer samples a step."])
    rate = learning_rate(config, student.config)
    teachers_blocks = teacher_config.get_text_config(decoder=True).num_hidden_layers
    use_cache = student.config.use_cache  # the Trainer turns it off

    with ExitStack() as stack:
        stack.enter_context(silenced())  # each checkpoint is written with a bar
        stack.enter_context(only_some_trained(student, config.train, kept, teachers_blocks))
        if teacher is not None:
            stack.enter_context(frozen(teacher))
        ours, theirs = split(student), None if teacher is None else split(teacher)
        stack.enter_context(training_forward(_loss(ours, theirs, config, kept)))
        trainer = DistillationTrainer(
            config,
            ours,
            model=student if config.lora_rank is None else _with_adapters(student, config.lora_rank),
            args=training_arguments(config, folder, steps, rate, student.dtype),
            train_dataset=samples,
            eval_dataset=validation,
            data_collator=collate,
        )

        # Measured before the first step and after the last one.
        checkpoint = last_checkpoint(folder)
        trainer.args.eval_on_start = checkpoint is None
        trainer.train(resume_from_checkpoint=checkpoint)
        history = trainer.state.log_history
        if not any("eval_kl" in row and row["step"] == steps for row in history):
            trainer.evaluate()

    student.config.use_cache = use_cache
    measured = [_measures(row) for row in history if "eval_kl" in row]
    return trainer, Distillation(steps, measured[0], measured[-1], history)


def _loss(
    student: SplitModel, teacher: SplitModel | None, config: DistillConfig, kept: Sequence[int] | None
) -> DistillationLoss:
    """The loss that the settings ask for."""
    return DistillationLoss(
        student,
        teacher,
        kind=config.divergence,
        temperature=config.temperature,
        top_k=config.compared_tokens,
        chunk_tokens=config.chunk_tokens,
        kept=kept if config.hidden_states else None,
    )


def _measures(row: dict[str, float]) -> dict[str, float]:
    """What an entry of the Trainer's history says about the validation samples."""
    return {"kl": row["eval_kl"], "perplexity": row["eval_perplexity"]}


def last_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that was written whole; None if there is none."""
    numbers = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            numbers.append(int(path.name.removeprefix("checkpoint-")))
    return str(folder / f"checkpoint-{max(numbers)}") if numbers else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer wrote trainer_state.json, its last file, to the end."""
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text()), dict)
    except (OSError, ValueError):
        return False


def _steps(config: DistillConfig, samples: int, processes: int) -> int:
    """Optimiser steps, as the Trainer counts them."""
    batches = math.ceil(samples / (config.batch_size * processes))
    steps_an_epoch = math.ceil(batches / config.gradient_accumulation)
    return min(config.max_steps, math.ceil(config.num_epochs * steps_an_epoch))


def _load_student(folder: Path, config: DistillConfig) -> PreTrainedModel:
    """The student, on the CPU: the Trainer moves or shards it."""
    automatic = "bfloat16" if torch.cuda.is_available() else "float32"
    dtype = automatic if config.dtype == "auto" else config.dtype
    return load_model(folder, dtype=dtype, device_map="cpu", trust_remote_code=config.trust_remote_code)


def _load_teacher(config: DistillConfig, state: PartialState) -> PreTrainedModel:
    """The teacher, on the device of this process: in 16 bits on a GPU, quantised where that is asked for."""
    cuda = torch.cuda.is_available()
    device = state.device if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if cuda else torch.float32

    return load_model(
        config.the_teacher,
        dtype=str(dtype).removeprefix("torch."),
        device_map=str(device),
        trust_remote_code=config.trust_remote_code,
        quantization="nf4" if config.teacher_quantization == "nf4" else None,
    )


def _with_adapters(student: PreTrainedModel, rank: int) -> Any:
    """The student with low-rank adapters on all its linear maps (arXiv 2106.09685); only these are trained."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _merged_weights(
    student: PreTrainedModel, trainer: DistillationTrainer, config: DistillConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The student's weights in the given dtype, gathered from all devices: every process must call this."""
    if config.lora_rank is not None:
        weights = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().state_dict()
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)

    tied = getattr(student, "all_tied_weights_keys", {})  # stored once, under the other name
    converted = {}
    for name, tensor in weights.items():
        if name not in tied:
            converted[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return converted


def _write(
    student: PreTrainedModel,
    weights: dict[str, Tensor],
    source: Path,
    out: Path,
    result: Distillation,
    config: DistillConfig,
) -> None:
    """Write the checkpoint: the trained weights, and the student's own other files."""
    summary = {
        "student": fingerprint.of_model(source),
        "steps": result.steps,
        "before": result.before,
        "after": result.after,
        "settings": asdict(config),
    }
    about = source / RECORD
    known = json.loads(about.read_text()) if about.is_file() else {}

    with replacing(out) as temporary:
        with silenced():
            student.save_pretrained(temporary, state_dict=weights)
        shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*_WEIGHTS), dirs_exist_ok=True)
        record = {**known, "distillation": summary}
        write_json(temporary / RECORD, record)
        add_training(temporary, str(source), record)
        write_json(temporary / "distillation.json", result.history)
