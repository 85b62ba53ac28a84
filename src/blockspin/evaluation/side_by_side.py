"""Several models in one table: perplexity, cost, scores on tasks. What `blockspin evaluate` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import EvaluateConfig
from ..files import replacing, write_json
from ..model.largest_batch import lowered_size
from ..model.loading import load_as, load_config, load_tokenizer
from ..problem import Removal
from ..settings import say
from ..surgery.checkpoint import checkpoint_bytes
from ..surgery.provenance import kept_blocks_of, read_record
from ..tables import Table
from .cost import ModelCost, Workload, costs_table, measure_costs
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

    models: short name -> hub id or folder. Texts and scores are by the short names, the lists in the order of models.
    """

    models: dict[str, str]
    evaluations: list[Evaluation] = field(default_factory=list)
    texts: dict[str, list[TextPerplexity]] = field(default_factory=dict)
    costs: list[ModelCost] = field(default_factory=list)
    scores: dict[str, list[Score]] = field(default_factory=dict)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry for each model."""
        entries = []
        for i, (name, source) in enumerate(self.models.items()):
            entry: dict[str, Any] = {"name": name, "model": source}
            if self.evaluations:
                entry |= self.evaluations[i].as_json()
            if self.texts:
                entry["texts"] = list(map(TextPerplexity.as_json, self.texts[name]))
            if self.costs:
                entry["cost"] = self.costs[i].as_json()
            if self.scores:
                entry["scores"] = list(map(Score.as_json, self.scores[name]))
            entries.append(entry)
        return entries

    def save(self, path: Path) -> None:
        """Write everything as JSON to `path`; texts, costs and scores also as Markdown beside it."""
        write_json(path, self.as_json())

        tables = []
        if self.texts:
            tables.append(texts_table(self.texts))
        if self.costs:
            tables.append(costs_table(self.costs))
        if self.scores:
            tables.append(scores_table(self.scores))

        if tables:
            page = "\n".join(map(Table.markdown, tables))
            with replacing(path.with_suffix(".md")) as temporary:
                temporary.write_text(page)


def no_table(table: Table) -> None:
    """Shows nothing."""


def evaluate_side_by_side(
    models: Sequence[str],
    config: EvaluateConfig,
    *,
    tasks: bool = True,
    samples: Sequence[Tensor] = (),
    texts: Sequence[str] = (),
    window: int = 2048,
    cost: Workload | None = None,
    show: Callable[[Table], None] = no_table,
) -> SideBySide:
    """Measure what is asked for; the first model is the one to compare with.

    Samples and costs hold all models in memory, since they take turns; texts and tasks one at a time.

    tasks: score the models on the tasks of the settings.
    samples: token samples for perplexity and speed, as in a run's report.
    texts, window: as in `text_perplexity`.
    cost: what to measure the costs on; None for no costs.
    show: is given each table as soon as it is measured, so that it is seen even if something later fails.

    Raises:
        ValueError: a model, a text or a task cannot be loaded, or does not go with the settings.
    """
    remote = config.trust_remote_code
    result = SideBySide(short_names(models))

    # Whatever can be refused is refused before anything is measured.
    tokenizers = {}
    for name, source in result.models.items():
        load_config(source, trust_remote_code=remote)
        tokenizers[name] = load_tokenizer(source, trust_remote_code=remote)
    if tasks:
        _check_tasks(result.models, tokenizers, config)

    if samples or cost is not None:
        _measure_together(result, config, samples, cost, show)

    if texts:
        for name, source in result.models.items():
            model = load_as(source, config)
            result.texts[name] = []
            for text in texts:
                result.texts[name].append(text_perplexity(model, tokenizers[name], text, window=window))
            del model  # before the next one is loaded
        show(texts_table(result.texts))

    if tasks:
        for name, source in result.models.items():
            result.scores[name] = evaluate_tasks(source, config, tokenizers[name])
        show(scores_table(result.scores))
    return result


def _measure_together(
    result: SideBySide,
    config: EvaluateConfig,
    samples: Sequence[Tensor],
    cost: Workload | None,
    show: Callable[[Table], None],
) -> None:
    """What is measured in turns, with all models in memory."""
    remote = config.trust_remote_code
    sizes, loaded = [], {}
    for name, source in result.models.items():
        sizes.append(checkpoint_bytes(source, trust_remote_code=remote))
        loaded[name] = load_as(source, config)

    if samples:
        say(lowered_size(config.batch_size, samples, *loaded.values()))
        rows = evaluate_models(loaded, sizes, samples, batch_size=config.batch_size)
        for row, source in zip(rows, result.models.values(), strict=True):
            result.evaluations.append(replace(row, removed=_removed_from(source, rows[0].num_blocks)))
        show(replace(results_table(result.evaluations), caption=missing_sublayers(result.models)))
    if cost is not None:
        result.costs = measure_costs(loaded, sizes, cost)
        show(costs_table(result.costs))


def missing_sublayers(models: Mapping[str, str]) -> str:
    """Which sub-layers are gone from the models that lack some, by the records in their folders.

    models: short name -> hub id or folder.
    """
    said = []
    for name, source in models.items():
        record = read_record(Path(source)) or {}
        if "gone" in record:
            said.append(f"{name} is without {', '.join(record['gone'])}.")
    return " ".join(said)


def _removed_from(source: str, depth: int) -> Removal:
    """The blocks of a model of so many that a shortened checkpoint lacks; none where no record tells."""
    kept = kept_blocks_of(Path(source), depth)
    return () if kept is None else tuple(sorted({*range(depth)} - {*kept}))


def short_names(models: Sequence[str]) -> dict[str, str]:
    """A name for each path or hub id: its last part, or the whole where two would have the same name."""
    last_parts = [Path(model).name for model in models]
    named = {}
    for model, last in zip(models, last_parts, strict=True):
        name = last if last_parts.count(last) == 1 else model
        named[name] = model
    return named


def _check_tasks(
    models: Mapping[str, str], tokenizers: Mapping[str, PreTrainedTokenizerBase], config: EvaluateConfig
) -> None:
    """Refuse tasks that some model cannot be scored on. Tasks whose results are kept on disk need no check."""
    for name, source in models.items():
        files = result_files(source, tokenizers[name], config)
        missing = [task for task in config.tasks if task not in files or not files[task].is_file()]
        if missing:
            check_tasks(missing, config, tokenizers[name])
