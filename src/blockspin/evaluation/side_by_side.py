"""Several models in one table: perplexity, cost, scores on tasks. What `blockspin evaluate` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import EvaluateConfig
from ..files import replacing, write_json
from ..model.loading import load_config, load_model, load_tokenizer
from ..surgery.checkpoint import checkpoint_bytes
from ..tables import Table
from .cost import ModelCost, costs_table, measure_costs
from .perplexity import (
    Evaluation,
    TextPerplexity,
    evaluate_models,
    results_table,
    text_perplexity,
    texts_table,
)
from .scores import Score, scores_table
from .tasks import check_tasks, evaluate_tasks, result_files


@dataclass
class SideBySide:
    """What was measured; empty where it was not asked for.

    models: short name -> hub id or folder; everything else is by the short names.
    """

    models: dict[str, str]
    evaluations: list[Evaluation] = field(default_factory=list)
    texts: dict[str, list[TextPerplexity]] = field(default_factory=dict)
    costs: list[ModelCost] = field(default_factory=list)
    scores: dict[str, list[Score]] = field(default_factory=dict)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry for each model."""
        rows = []
        for i, (name, source) in enumerate(self.models.items()):
            row: dict[str, Any] = {"name": name, "model": source}
            if self.evaluations:
                row |= self.evaluations[i].as_json()
            if self.texts:
                row["texts"] = [text.as_json() for text in self.texts[name]]
            if self.costs:
                row["cost"] = self.costs[i].as_json()
            if self.scores:
                row["scores"] = [score.as_json() for score in self.scores[name]]
            rows.append(row)
        return rows

    def save(self, path: Path) -> None:
        """The JSON at `path`, and what is not samples as Markdown beside it."""
        write_json(path, self.as_json())
        tables = []
        if self.texts:
            tables.append(texts_table(self.texts))
        if self.costs:
            tables.append(costs_table(self.costs))
        if self.scores:
            tables.append(scores_table(self.scores))
        if tables:
            with replacing(path.with_suffix(".md")) as temporary:
                temporary.write_text("\n".join(table.markdown() for table in tables))


def evaluate_side_by_side(
    models: Sequence[str],
    config: EvaluateConfig,
    *,
    tasks: bool = True,
    samples: Sequence[Tensor] = (),
    texts: Sequence[str] = (),
    window: int = 2048,
    cost: dict[str, Any] | None = None,
    show: Callable[[Table], None] = lambda table: None,
) -> SideBySide:
    """Measure what is asked for; the first model is the one to compare with.

    tasks: score on the tasks of the settings. samples: for perplexity and speed as in a run's report. texts, window: as
    in `text_perplexity`. cost: arguments of `measure_costs`, None for no costs. show: is given each table as soon as it
    is there, so that it is seen even if something later fails.
    Samples and costs hold all models in memory, since they take turns; texts and tasks one at a time.

    Raises:
        ValueError: a model, a text or a task cannot be had, or does not go with the settings.
    """
    remote = config.trust_remote_code
    result = SideBySide(short_names(models))
    for source in result.models.values():
        load_config(source, trust_remote_code=remote)
    tokenizers = {name: load_tokenizer(source, trust_remote_code=remote) for name, source in result.models.items()}
    if tasks:
        _check(result.models, tokenizers, config)
    batch_size = 8 if config.batch_size == "auto" else int(config.batch_size)

    def load(source: str) -> Any:
        return load_model(source, dtype=config.dtype, device_map=config.device_map, trust_remote_code=remote)

    if samples or cost is not None:
        sizes = [checkpoint_bytes(source, trust_remote_code=remote) for source in result.models.values()]
        loaded = {name: load(source) for name, source in result.models.items()}
        if samples:
            result.evaluations = evaluate_models(loaded, sizes, samples, batch_size=batch_size)
            show(results_table(result.evaluations))
        if cost is not None:
            result.costs = measure_costs(loaded, sizes, **cost)
            show(costs_table(result.costs))
        del loaded
    if texts:
        for name, source in result.models.items():
            model = load(source)
            result.texts[name] = [text_perplexity(model, tokenizers[name], text, window=window) for text in texts]
            del model
        show(texts_table(result.texts))
    if tasks:
        for name, source in result.models.items():
            result.scores[name] = evaluate_tasks(source, config, tokenizers[name])
        show(scores_table(result.scores))
    return result


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The last part of each path or hub id -> the whole; the whole where two would be called the same."""
    last = [Path(model).name for model in models]
    return {name if last.count(name) == 1 else model: model for name, model in zip(last, models, strict=True)}


def _check(
    models: Mapping[str, str], tokenizers: Mapping[str, PreTrainedTokenizerBase], config: EvaluateConfig
) -> None:
    """Refuse what some model could not be scored on before any is; results kept on disk need no check."""
    for name, source in models.items():
        files = result_files(source, tokenizers[name], config)
        missing = [task for task in config.tasks if task not in files or not files[task].is_file()]
        if missing:
            check_tasks(missing, config, tokenizers[name])
