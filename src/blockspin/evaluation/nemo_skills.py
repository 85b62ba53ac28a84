"""The same benchmarks as commands of NeMo-Skills, for those who use it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..config import EvaluateConfig

# Task of the lm-evaluation-harness -> benchmark of NeMo-Skills.
BENCHMARKS = {
    "aime24": "aime24",
    "aime25": "aime25",
    "gpqa_diamond_cot_zeroshot": "gpqa",
    "gpqa_diamond_generative_n_shot": "gpqa",
    "gsm8k": "gsm8k",
    "gsm8k_cot": "gsm8k",
    "ifeval": "ifeval",
    "mmlu": "mmlu",
    "mmlu_pro": "mmlu-pro",
}


def commands(models: Sequence[str], config: EvaluateConfig) -> str:
    """Shell commands that prepare the data, evaluate each model with the same numbers of rollouts, and summarise.

    Raises:
        ValueError: NeMo-Skills has none of the tasks.
    """
    rollouts = dict(config.rollouts)
    names = {task: BENCHMARKS[task] for task in config.tasks if task in BENCHMARKS}
    if not names:
        raise ValueError(f"NeMo-Skills has none of {', '.join(config.tasks)}; it has {', '.join(BENCHMARKS)} (--tasks)")

    lines = []
    absent = [task for task in config.tasks if task not in names]
    if absent:
        lines.append(f"# not in NeMo-Skills: {', '.join(absent)}")
    lines.append(f"ns prepare_data {' '.join(dict.fromkeys(names.values()))}")

    # "gsm8k" is one greedy answer, "aime25:10" ten rollouts.
    benchmarks = []
    for task, name in names.items():
        benchmarks.append(f"{name}:{rollouts[task]}" if task in rollouts else name)

    for model in models:
        out = f"nemo-skills-{Path(model).name}"
        options = [
            "--cluster=local",
            "--server_type=vllm",
            "--server_gpus=1",
            f"--model={shlex.quote(model)}",
            f"--benchmarks={','.join(benchmarks)}",
            f"--output_dir={shlex.quote(out)}",
        ]
        if rollouts:
            options += [f"++inference.temperature={config.temperature}", f"++inference.top_p={config.top_p}"]
        if config.max_gen_tokens is not None:
            options.append(f"++inference.tokens_to_generate={config.max_gen_tokens}")

        lines.append(" \\\n    ".join(["ns eval", *options]))
        lines.append(f"ns summarize_results --cluster=local {shlex.quote(out)}")
    return "\n".join(lines)
