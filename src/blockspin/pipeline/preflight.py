"""What is refused before a run starts: folders of other runs, impossible removals, trainings that lack memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from ..config import (
    GRADIENT_ENERGIES,
    ChoosingSettings,
    CompressConfig,
    DataSettings,
    EnergySettings,
    LoadingSettings,
    SolvingSettings,
    TaskSettings,
)
from ..costs.targets import goals_of, read_times
from ..distillation.activations import activation_bytes
from ..distillation.preflight import (
    check_requirements,
    check_room,
    choose_quantization,
    free_memory,
    memory_estimate,
    weight_bytes,
)
from ..journal import check_settings
from ..model.blocks import count_parameters, find_blocks
from ..model.loading import model_without_weights
from ..model.offload import is_offloaded
from ..model.quantization import is_quantized
from ..problem import Block, Budget, check_goal
from ..repairs.run import check_text
from ..settings import Settings
from ..solvers import SOLVERS
from ..surgery.checkpoint import checkpoint_bytes
from ..targets import TargetSettings
from .stages import Samples, max_length


def _names(*groups: type[Settings]) -> tuple[str, ...]:
    names: list[str] = []
    for group in groups:
        names += group.__dataclass_fields__
    return tuple(names)


# Files of a run, and the settings that decided what is in them. How the samples are shared out depends on all numbers.
_DECIDED_BY = (
    ("energies.*", ("model", "calibration", "evaluation", "selection_samples", "evaluation_samples")),
    ("energies.*", tuple(name for name in _names(DataSettings, LoadingSettings, EnergySettings) if name != "stream")),
    ("spectrum.json", ("remove", *_names(SolvingSettings, TargetSettings))),
    ("candidates.*", _names(ChoosingSettings)),
    ("evaluation.json", _names(TaskSettings)),
    ("repaired*", ("repair", "own_text")),
    ("distilled*", ("repair", "own_text", "distill")),
)


def open_run(config: CompressConfig, out: Path) -> None:
    """Refuse what `check_run` refuses, and remove journals in which nothing is written yet.

    Raises:
        ValueError: the folder cannot be used.
    """
    check_run(config, out)
    for journal in out.glob("*.partial.jsonl"):
        if _is_empty(journal):
            journal.unlink()


def check_run(config: CompressConfig, out: Path) -> None:
    """Refuse a folder that holds other files, or stages of a run that were made with other settings.

    Settings count from the stage on that used them: a run that failed or was cut off before it goes on with new ones.
    Journals in which nothing is written yet bind nobody.

    Raises:
        ValueError: the folder cannot be used.
    """
    recorded = out / "run.yaml"
    if not recorded.is_file():
        check_settings(out, "run", None, {})
        return

    used: set[str] = set()
    for pattern, names in _DECIDED_BY:
        if not all(map(_is_empty, out.glob(pattern))):
            used.update(names)

    stored = CompressConfig(**CompressConfig.read(recorded))
    settings = asdict(config)
    wanted = {name: settings[name] for name in settings if name in used}
    check_settings(out, "run", asdict(stored), wanted)


def _is_empty(path: Path) -> bool:
    """Whether a file is a journal that has its first line only."""
    return path.name.endswith(".partial.jsonl") and len(path.read_bytes().splitlines()) < 2


def check_before(config: CompressConfig, model_config: PretrainedConfig) -> None:
    """Refuse what cannot end well before anything is loaded: impossible removals, weights that cannot be rewritten."""
    blocks = find_blocks(model_without_weights(model_config, trust_remote_code=config.trust_remote_code))
    if config.units == "blocks":  # sub-layers show when the model runs
        budgets = goals_before(config, blocks)
        if config.remove is not None or budgets:
            check_goal(blocks, config.remove, config.protect, budgets)
    elif config.stream:
        raise ValueError(
            "a checkpoint without sub-layers is proven by loading it; leave out --stream, or remove --units blocks"
        )

    if config.beta != 0 and config.energy not in GRADIENT_ENERGIES:
        raise ValueError(f"--beta weighs a gradient: choose --energy {' or '.join(GRADIENT_ENERGIES)}, or leave it out")
    if config.solver != "auto" and config.solver not in SOLVERS:
        raise ValueError(f"unknown solver {config.solver!r}; choose auto or one of {', '.join(SOLVERS)} (--solver)")

    checkpoint_bytes(config.model, trust_remote_code=config.trust_remote_code)
    if config.stream:
        check_streaming(config)
    if config.quantization is not None and config.needs_times and config.profile is None:
        raise ValueError(
            "times of a quantised model are not those of the checkpoint; leave out --quantization, or give the times "
            "(--profile, of `blockspin profile`)"
        )
    if config.distill is not None:
        check_distillation(config, model_config, blocks)


def goals_before(config: CompressConfig, units: Sequence[Block]) -> list[Budget]:
    """The targets of a run that can be checked before the model is loaded: those of time only if a table is given."""
    times = None if config.profile is None else read_times(config)
    return goals_of(config, config.model, units, times, trust_remote_code=config.trust_remote_code)


def check_streaming(config: CompressConfig) -> None:
    """Refuse what a model whose blocks are on disk is not made for.

    Raises:
        ValueError: the energy is one of gradients, there are tasks, or the original shall write.
    """
    if config.energy in GRADIENT_ENERGIES:
        raise ValueError(
            "gradients need all weights at once, and here blocks are read one by one (--stream); choose --energy "
            "fitted, secant or pairwise"
        )
    if config.tasks:
        raise ValueError(
            "where blocks are read one by one (--stream), a token of an answer takes a reading of all weights; leave "
            "out --tasks, and score the smaller model later (blockspin evaluate)"
        )
    if config.own_text:
        raise ValueError(
            "where blocks are read one by one (--stream), a token that the original writes takes a reading of all "
            "weights; leave out --own-text"
        )


def check_repair_text(config: CompressConfig, model: PreTrainedModel, samples: Samples) -> None:
    """Refuse too little text for the repair, which comes last, where the model's maps can be seen at once.

    Raises:
        ValueError: says how much is needed.
    """
    if config.repair and not is_offloaded(model) and not is_quantized(model):
        check_text(model, [*samples.calibration, *samples.selection], config.batch_size, config.seed)


def check_distillation(config: CompressConfig, model_config: PretrainedConfig, blocks: Sequence[Block]) -> None:
    """Refuse a training that lacks packages or room, even where the largest blocks are the ones that go."""
    assert config.distill is not None
    check_requirements(config.distill)

    # The smallest student that the goal allows.
    sizes = sorted(block.num_parameters for block in blocks)
    if config.remove is None:  # targets may take all but one
        gone = sum(sizes[1:])
    elif isinstance(config.remove, float):
        gone = int(config.remove * sum(sizes))
    else:
        number = sum(config.remove.values()) if isinstance(config.remove, dict) else config.remove
        gone = sum(sizes[-number:])

    # The teacher is the original.
    model = model_without_weights(model_config, trust_remote_code=config.trust_remote_code)
    teacher = count_parameters(model)
    settings = replace(config.distill, teacher=config.model, max_length=max_length(config, model_config))
    settings = replace(settings, teacher_quantization=choose_quantization(settings))
    vocabulary = model_config.get_text_config(decoder=True).vocab_size
    left = 1 - gone / sum(sizes)  # of the blocks
    activations = left * activation_bytes(model, weight_bytes(settings), settings.gradient_checkpointing)
    check_room(memory_estimate(teacher - gone, teacher, vocabulary, settings, 1, activations), free_memory())
