"""Scores on benchmark tasks: read from the harness's results, compared with guessing, averaged over rollouts."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from ..scatter import plus_minus, standard_error
from ..tables import Column, Table

# What a task is scored by; other tasks by acc_norm where they have it, else by what they report first.
METRICS = {
    "mmlu": "acc,none",
    "hellaswag": "acc_norm,none",
    "winogrande": "acc,none",
    "arc_challenge": "acc_norm,none",
    "leaderboard_bbh": "acc_norm,none",
    "gsm8k": "exact_match,strict-match",
    "gpqa_diamond_cot_zeroshot": "exact_match,flexible-extract",
}
AT_CHANCE = "* within two standard errors of guessing"


@dataclass(frozen=True)
class Score:
    """The score of one model on one task.

    metric: as the harness names it, "acc_norm" or "exact_match (strict-match)".
    value, stderr: of the metric; accuracies are between 0 and 1.
    chance: what guessing gets; None where that has no meaning.
    num_samples: number of questions.
    rollouts: with repeated sampling the score of each rollout; `value` is their mean and `stderr` its standard error.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    chance: float | None
    num_samples: int
    num_fewshot: int
    rollouts: tuple[float, ...] = ()

    @property
    def at_chance(self) -> bool:
        """Within two standard errors of guessing: the measured standard error or, where larger, that of guessing."""
        if self.chance is None:
            return False
        guessing = math.sqrt(self.chance * (1 - self.chance) / self.num_samples)
        return abs(self.value - self.chance) <= 2 * max(self.stderr or 0.0, guessing)

    def as_text(self) -> str:
        """ "65.1 ±0.4" in percent where guessing has a level, else as the harness reports it; a star at chance."""
        factor, digits = (1.0, 4) if self.chance is None else (100.0, 1)
        spread = plus_minus(None if self.stderr is None else factor * self.stderr, digits)
        return f"{factor * self.value:.{digits}f}{spread}{'*' * self.at_chance}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "rollouts": list(self.rollouts), "at_chance": self.at_chance}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Score:
        known = dict(values)
        known.pop("at_chance", None)  # computed from the others
        known["rollouts"] = tuple(values["rollouts"])
        return Score(**known)


def extract_scores(results: Mapping[str, Any], loaded: Mapping[str, Any], task: str, rollouts: int = 0) -> list[Score]:
    """The scores in what `lm_eval.evaluate` returned for a task or group: one, or one for each member.

    rollouts: how many answers were sampled for each question; 0: none, there is one greedy answer.
    """
    # A group that the harness does not aggregate has no metrics of its own: its members are scored.
    names = list(loaded["tasks"])
    for outer in (task, *loaded["groups"]):
        if outer in results["results"]:
            names = [outer] if _metrics(results["results"][outer]) else names
            break

    scores = []
    for name in names:
        group = loaded["groups"].get(name)
        members = [member.task_name for member in group.get_all_tasks()] if group else [name]
        num_samples = 0
        for member in members:
            num_samples += results["n-samples"][member]["effective"]

        values = results["results"][name]
        key = _chosen_metric(name, _metrics(values))
        metric, chosen = key.split(",")  # the metric and the harness's filter, "none" for no filter
        stderr = values.get(f"{metric}_stderr,{chosen}")

        score = Score(
            task=name,
            metric=metric if chosen == "none" else f"{metric} ({chosen})",
            value=float(values[key]),
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            chance=_chance(results, members, group, metric, chosen),
            num_samples=num_samples,
            num_fewshot=int(results["n-shot"].get(name, results["n-shot"][members[0]])),
        )
        scores.append(_over_rollouts(score, loaded, metric, chosen, rollouts) if rollouts else score)
    return scores


def _metrics(values: Mapping[str, Any]) -> list[str]:
    """The keys of the metrics among the harness's results of a task: "acc,none", without their standard errors."""
    metrics = []
    for key, value in values.items():
        if isinstance(value, (int, float)) and "," in key and "_stderr," not in key:
            metrics.append(key)
    return metrics


def _chosen_metric(task: str, metrics: Sequence[str]) -> str:
    """What a task is scored by: its entry in METRICS, else acc_norm, else the first metric it reports."""
    if task in METRICS:
        return METRICS[task]
    for metric in metrics:
        if metric.startswith("acc_norm,"):
            return metric
    return metrics[0]


def _chance(results: Mapping[str, Any], members: Sequence[str], group: Any, metric: str, chosen: str) -> float | None:
    """What guessing gets, from the questions themselves; in a group weighted as the scores are."""
    if metric not in ("acc", "acc_norm", "exact_match"):
        return None

    levels = []  # for each member those of its questions
    for member in members:
        kind = results["configs"][member]["output_type"]
        guesses = []
        for sample in results["samples"][member]:  # every question once for each filter
            if sample["filter"] == chosen:
                guesses.append(_guess(sample, kind))
        levels.append(guesses)

    if group is None or group.aggregate_metric_list[0].weight_by_size:
        return statistics.fmean(chain.from_iterable(levels))
    return statistics.fmean(map(statistics.fmean, levels))


def _guess(sample: Mapping[str, Any], output_type: str) -> float:
    """1 / number of choices; 0 for a question with a free answer."""
    if output_type == "multiple_choice":
        return 1 / len(sample["arguments"])

    # A question whose answer is written freely may list its choices, or number them as GPQA does.
    question = sample["doc"]
    listed = question.get("choices")
    numbered = [key for key in question if re.fullmatch(r"choice\d+", key)]
    choices = len(listed) if isinstance(listed, list) else len(numbered)
    return 1 / choices if choices else 0.0


def _over_rollouts(score: Score, loaded: Mapping[str, Any], metric: str, chosen: str, rollouts: int) -> Score:
    """The score of each rollout, their mean and its standard error.

    The harness keeps every answer but scores only the first; here its filters and its metric are applied to one rollout
    after the other. metric, chosen: what counts, and the filter of the answers, as the harness names them.
    """
    tasks = [loaded["tasks"][score.task]] if score.task in loaded["tasks"] else list(loaded["tasks"].values())
    answers: dict[int, list[str]] = {}  # of each request, in the order of rollouts
    for task in tasks:
        for instance in task.instances:
            answers[id(instance)] = list(instance.resps)

    values = []
    for k in range(rollouts):
        hits: list[float] = []
        for task in tasks:
            hits += _question_values(task, answers, k, metric, chosen)
        values.append(statistics.fmean(hits))

    if rollouts == 1:
        return replace(score, rollouts=tuple(values))
    value, stderr = statistics.fmean(values), standard_error(values)
    return replace(score, value=value, stderr=stderr, rollouts=tuple(values))


def _question_values(task: Any, answers: Mapping[int, list[str]], k: int, metric: str, chosen: str) -> list[float]:
    """The metric of each question of a task for the k-th answers."""
    questions = defaultdict(list)
    for instance in task.instances:
        instance.resps = [answers[id(instance)][k]]
        questions[instance.doc_id].append(instance)
    task.apply_filters()

    values = []
    for requests in questions.values():
        filtered = [request.filtered_resps[chosen] for request in requests]
        values.append(float(task.process_results(requests[0].doc, filtered)[metric]))
    return values


def scores_table(scores: Mapping[str, Sequence[Score]]) -> Table:
    """Models side by side (name -> scores on the same tasks), tasks down; in percent with standard errors."""
    columns = [Column("task", words=True), Column("metric", words=True), Column("questions"), Column("guessing")]
    columns += map(Column, scores)

    # Tasks down: the i-th score of every model is on the same task.
    rows = []
    first = next(iter(scores.values()))
    marked = False
    for i, score in enumerate(first):
        metric = f"{score.metric}, {score.num_fewshot}-shot"
        metric += f", mean of {len(score.rollouts)} rollouts" if score.rollouts else ""
        chance = "" if score.chance is None else f"{100 * score.chance:.1f}"
        cells = [score.task, metric, str(score.num_samples), chance]
        for column in scores.values():
            cells.append(column[i].as_text())
            marked = marked or column[i].at_chance
        rows.append(cells)
    return Table(columns, rows, caption=AT_CHANCE if marked else "")


def mean_scores(drawn: Sequence[tuple[Score, ...]]) -> tuple[Score, ...]:
    """The mean of several models' scores, task by task; their standard errors count as independent."""
    means = []
    for scores in zip(*drawn, strict=True):
        value = statistics.fmean([score.value for score in scores])
        errors = [score.stderr for score in scores if score.stderr is not None]
        stderr = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
        means.append(replace(scores[0], value=value, stderr=stderr))
    return tuple(means)
