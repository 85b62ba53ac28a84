"""Scores on tasks of the lm-evaluation-harness: against a few lines of our own, and scripted answers."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
import yaml
from conftest import Command

from blockspin import evaluate, prune_checkpoint, remove_blocks
from blockspin.comparison import run as comparison
from blockspin.comparison.methods import methods
from blockspin.comparison.report import write_report
from blockspin.config import PAPER_TASKS, CompressConfig, EvaluateConfig
from blockspin.evaluation import harness
from blockspin.evaluation.perplexity import results_table
from blockspin.pipeline.compress import compress
from blockspin.pipeline.plan import plan_run

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")


QUESTIONS: list[dict[str, Any]] = [
    {"question": "a few words", "choices": ["to learn", "from", "a few"], "answer": 0},
    {"question": "words", "choices": ["to", "words to learn from"], "answer": 1},
    {"question": "learn from", "choices": ["few", "a", "learn", "words words"], "answer": 2},
    {"question": "few", "choices": ["words", "a few"], "answer": 0},
    {"question": "to", "choices": ["learn", "words", "from"], "answer": 1},
]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """Two tasks of our own: `choose` one of two to four answers, and `write` a number."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choose = {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    write = {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}],
            }
        ],
    }
    for task in (choose, write):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    group = {"group": "both", "task": ["choose", "write"]}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    harness._indexed.cache_clear()
    return folder


@pytest.fixture
def options(task_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {"include_path": str(task_folder), "cache": str(tmp_path / "cache")}


def answer_logprobs(folder: Path, question: str, answer: str) -> float:
    """The log-probability of " answer" after the question."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    start = tokenizer(question).input_ids
    whole = tokenizer(f"{question} {answer}").input_ids
    assert whole[: len(start)] == start
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, whole[i]]) for i in range(len(start), len(whole)))


def test_accuracies_and_chance_by_hand(tiny_folder: Path, options: dict[str, Any]) -> None:
    right = []
    for row in QUESTIONS:
        # The harness divides by the number of characters of the answer without the space before it.
        per_character = [answer_logprobs(tiny_folder, row["question"], c) / len(c) for c in row["choices"]]
        right.append(per_character.index(max(per_character)) == row["answer"])
    (score,) = evaluate(tiny_folder, ["choose"], **options)
    assert score.metric == "acc_norm"
    assert score.value == pytest.approx(statistics.fmean(right))
    assert score.stderr == pytest.approx(statistics.stdev(map(float, right)) / math.sqrt(len(QUESTIONS)))
    assert score.chance == pytest.approx(statistics.fmean(1 / len(row["choices"]) for row in QUESTIONS))
    assert (score.num_samples, score.num_fewshot) == (5, 0)


def test_a_model_in_memory_scores_as_from_disk(tiny_folder: Path, options: dict[str, Any]) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    assert evaluate(model, ["choose"], **options) == evaluate(tiny_folder, ["choose"], **options)
    shortened = remove_blocks(model, [1])
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_folder)
    assert len(evaluate(shortened, ["choose"], tokenizer=tokenizer, **options)) == 1
    assert len(list(Path(options["cache"]).iterdir())) == 3  # every model has its own


def test_a_group_without_a_score_of_its_own_gives_its_members(
    tiny_folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = harness._indexed  # without the harness's own tasks, whose index takes long
    monkeypatch.setattr(harness, "_indexed", lambda folder, _: indexed(folder, False))
    choose, write = evaluate(tiny_folder, ["both"], **options)
    assert (choose.task, choose.metric) == ("choose", "acc_norm")
    assert (write.task, write.metric) == ("write", "exact_match (number)")
    assert write.chance == choose.chance  # the same questions, with the choices in the data
    assert evaluate(tiny_folder, ["both"], **options) == [choose, write]


def test_results_are_kept_and_an_interrupted_run_continues(
    tiny_folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = harness.run

    def interrupted(lm: Any, loaded: Any, config: EvaluateConfig, rollouts: int = 0) -> dict[str, Any]:
        ran.extend(loaded["tasks"])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run(lm, loaded, config, rollouts)

    monkeypatch.setattr(harness, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_folder, ["choose", "write"], **options)
    first = evaluate(tiny_folder, ["choose", "write"], **options)
    assert ran == ["choose", "write", "write"]
    monkeypatch.setattr(harness, "open_model", lambda *_: pytest.fail("the model was opened again"))
    assert evaluate(tiny_folder, ["choose", "write"], **options) == first
    assert evaluate(tiny_folder, ["write"], **options) == first[1:]


@pytest.mark.parametrize("change", ["limit", "weights", "task file"])
def test_results_of_something_else_are_not_taken(
    tiny_folder: Path, options: dict[str, Any], task_folder: Path, change: str
) -> None:
    evaluate(tiny_folder, ["choose"], **options)
    if change == "weights":
        weights = tiny_folder / "model.safetensors"
        os.utime(weights, ns=(1, 1))
    elif change == "task file":
        file = task_folder / "choose.yaml"
        file.write_text(file.read_text() + "description: something before\n")
    evaluate(tiny_folder, ["choose"], **options, **({"limit": 3} if change == "limit" else {}))
    assert len(list(Path(options["cache"]).iterdir())) == 2


def scripted(answers: list[list[str]]) -> Any:
    """A model that gives the answers written down for it, question by question, and has no memory for choices."""
    from lm_eval.api.model import LM

    class Scripted(LM):  # type: ignore[misc]
        max_length, max_gen_toks = 512, 16
        answers_left: ClassVar = {row["question"]: iter(given) for row, given in zip(QUESTIONS, answers, strict=True)}
        asked: ClassVar[list[Any]] = []

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self.asked.extend(request.args[1] for request in requests)
            return [next(self.answers_left[request.args[0]]) for request in requests]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            raise torch.OutOfMemoryError("CUDA out of memory")

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

    return Scripted()


def test_rollouts_are_scored_one_by_one(
    tiny_folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [["0", "it is 0", "7"], ["1", "2", "no"], ["2", "2", "2"], ["5", "0", "1"], ["0", "0", "1"]]
    lm = scripted(answers)
    monkeypatch.setattr(harness, "open_model", lambda *_: lm)
    (score,) = evaluate(tiny_folder, rollouts={"write": 3}, temperature=0.7, top_p=0.9, **options)
    assert score.rollouts == (3 / 5, 3 / 5, 2 / 5)
    assert score.value == pytest.approx(8 / 15)
    assert score.stderr == pytest.approx(statistics.stdev([0.6, 0.6, 0.4]) / math.sqrt(3))
    assert len(lm.asked) == 15
    assert {"do_sample": True, "temperature": 0.7, "top_p": 0.9}.items() <= lm.asked[0].items()
    assert evaluate(tiny_folder, rollouts={"write": 3}, temperature=0.7, top_p=0.9, **options) == [score]


def test_rollouts_of_a_real_model_differ(tiny_folder: Path, options: dict[str, Any], task_folder: Path) -> None:
    """Every question gets as many answers as rollouts, drawn apart."""
    lm = harness.open_model(tiny_folder, tf.AutoTokenizer.from_pretrained(tiny_folder), EvaluateConfig())
    loaded = harness.find_tasks(["write"], str(task_folder))["write"]
    harness.run(lm, loaded, EvaluateConfig(temperature=2.0, top_p=1.0), rollouts=4)
    answers = [instance.resps for instance in loaded["tasks"]["write"].instances]
    assert [len(given) for given in answers] == [4] * 5
    assert all(len(set(given)) > 1 for given in answers)


def test_the_default_tasks_are_those_of_the_paper() -> None:
    assert EvaluateConfig().tasks == PAPER_TASKS
    sampled: dict[str, Any] = {"rollouts": {"aime25": 10}}  # a mapping, as settings files have it
    named: dict[str, Any] = {"tasks": ["mmlu"], **sampled}
    assert EvaluateConfig(**sampled).tasks == ("aime25",)
    assert EvaluateConfig(**named).tasks == ("mmlu", "aime25")


def no_template(folder: Path, options: dict[str, Any]) -> None:
    evaluate(folder, ["choose"], apply_chat_template=True, **options)


def too_long(folder: Path, options: dict[str, Any]) -> None:
    evaluate(folder, ["write"], max_gen_tokens=64, **options)


ERRORS: dict[str, tuple[Callable[..., Any], str]] = {
    "unknown task": (lambda f, o: evaluate(f, ["chose"], **{**o, "include_path": None}), "did you mean"),
    "no chat template": (no_template, "no chat template; leave --apply-chat-template out"),
    "answers too long": (too_long, "context holds 64; allow fewer with --max-gen-tokens"),
    "rollouts of choices": (
        lambda f, o: evaluate(f, rollouts={"choose": 2}, **o),
        "--rollouts needs tasks that generate",
    ),
    "no folder": (
        lambda f, o: evaluate(f, ["choose"], include_path="/nowhere"),
        "--include-path /nowhere is not a folder",
    ),
    "backend": (lambda f, o: evaluate(f, ["choose"], backend="tpu"), "--backend must be one of hf, vllm"),
    "no vllm": (lambda f, o: evaluate(f, ["choose"], backend="vllm", **o), "pip install vllm"),
    "limit": (lambda f, o: evaluate(f, ["choose"], limit=0), "--limit must be positive"),
    "top-p": (lambda f, o: evaluate(f, rollouts={"write": 2}, top_p=0), "--top-p"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(
    case: str, tiny_folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, message = ERRORS[case]
    if case == "unknown task":  # the index of the harness's own tasks takes long
        index = SimpleNamespace(all_tasks=["choose", "gsm8k"])
        monkeypatch.setattr(harness, "_indexed", lambda *_: index)
    with pytest.raises(ValueError, match=message) as raised:
        run(tiny_folder, options)
    assert "\n" not in str(raised.value)


def test_out_of_memory_suggests_a_batch_size(
    tiny_folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "open_model", lambda *_: scripted([[]] * 5))
    with pytest.raises(ValueError, match="out of memory with --batch-size 16; try --batch-size 8"):
        evaluate(tiny_folder, ["choose"], batch_size=16, **options)
    with pytest.raises(ValueError, match="with --batch-size 1; spread the model with --device-map auto"):
        evaluate(tiny_folder, ["choose"], batch_size=1, **options)


def test_without_the_harness(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ValueError, match=r"pip install 'blockspin\[eval\]'"):
        evaluate(tiny_folder, ["choose"], cache=None)


@pytest.mark.parametrize("gated", [True, False])
def test_data_that_cannot_be_had(
    gated: bool, tiny_folder: Path, options: dict[str, Any], task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    message = "Dataset 'org/data' is a gated dataset on the Hub." if gated else "Couldn't reach 'org/data' on the Hub"

    def refuse(*_: Any, **__: Any) -> None:
        raise (DatasetNotFoundError if gated else ConnectionError)(message)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    remedy = "log in with `hf auth login`" if gated else "--include-path"
    with pytest.raises(ValueError, match="data of task choose cannot be loaded") as raised:
        evaluate(tiny_folder, ["choose"], **options)
    assert remedy in str(raised.value)
    assert message in str(raised.value)


@pytest.fixture
def run_settings(tiny_folder: Path, text_file: Path, task_folder: Path) -> CompressConfig:
    small: dict[str, Any] = {"selection_samples": 4, "evaluation_samples": 4, "max_length": 32, "states": 3}
    tasks: dict[str, Any] = {"tasks": ("choose",), "include_path": str(task_folder), "limit": 4}
    return CompressConfig(str(tiny_folder), str(text_file), 1, **small, **tasks)


def test_compress_scores_what_it_reports(
    run_settings: CompressConfig, tiny_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    rows = compress(run_settings, tmp_path / "run")
    assert compress(run_settings, tmp_path / "run") == rows  # read again, scores and all
    whole, chosen = rows[0].scores, rows[2].scores
    assert whole == tuple(evaluate(tiny_folder, ["choose"], limit=4, **options))
    assert chosen == tuple(evaluate(tmp_path / "run" / "checkpoint", ["choose"], limit=4, **options))
    assert "choose" in [column.heading for column in results_table(rows).columns]
    assert CompressConfig(**CompressConfig.read(tmp_path / "run" / "run.yaml")) == run_settings


def test_a_plan_times_a_few_questions(run_settings: CompressConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group, without the group's own score."""
    indexed = harness._indexed
    monkeypatch.setattr(harness, "_indexed", lambda folder, _: indexed(folder, False))
    planned = plan_run(dataclasses.replace(run_settings, tasks=("both", "choose"), max_gen_tokens=4)).stages[-1]
    assert planned.title == "questions of benchmark tasks (estimated from a few)"
    assert planned.samples == 5 * (4 + 4 + 4)  # to the original, three shortened models and the repaired one
    assert planned.seconds is not None
    assert planned.seconds > 0

    # What a run would refuse at its end is refused here.
    with pytest.raises(ValueError, match="allow fewer with --max-gen-tokens"):
        plan_run(dataclasses.replace(run_settings, tasks=("write",), max_gen_tokens=64))


def test_compress_refuses_an_unknown_task_before_it_starts(
    run_settings: CompressConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = harness._indexed
    monkeypatch.setattr(harness, "_indexed", lambda folder, _: indexed(folder, False))
    with pytest.raises(ValueError, match=r"no task 'chose' .*did you mean choose"):
        compress(dataclasses.replace(run_settings, tasks=("chose",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_compare_has_a_column_for_each_task(
    run_settings: CompressConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [method for method in methods(run_settings) if method.name in ("CBO:0", "last blocks", "random")]
    monkeypatch.setattr(comparison, "methods", lambda config: few)
    out = tmp_path / "out"
    found = comparison.compare(run_settings, {"1": 1}, out)
    assert comparison.compare(run_settings, {"1": 1}, out).rows == found.rows
    model = tf.AutoModelForCausalLM.from_pretrained(run_settings.model, dtype=torch.float32)
    tokenizer = tf.AutoTokenizer.from_pretrained(run_settings.model)
    options = {"include_path": run_settings.include_path, "limit": 4, "cache": None}
    for row in found.rows:
        shortened = remove_blocks(model, row.removed) if row.removed else model
        assert row.scores == tuple(evaluate(shortened, ["choose"], tokenizer=tokenizer, **options)), row.method
    write_report(out)
    assert "| choose |" in (out / "comparison.md").read_text()
    assert "<th>choose</th>" in (out / "report.html").read_text()
    with (out / "comparison.csv").open() as file:
        assert [float(line["choose"]) for line in csv.DictReader(file)] == [row.scores[0].value for row in found.rows]


def test_evaluate_puts_models_side_by_side(
    command: Command, tiny_folder: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    prune_checkpoint(tiny_folder, [1], tmp_path / "short")
    flags = ["--tasks", "choose,write", "--include-path", options["include_path"], "--cache", options["cache"]]
    code, printed = command("evaluate", tiny_folder, tmp_path / "short", *flags, "--out", tmp_path / "out.json")
    assert code == 0, printed
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in rows] == ["model", "short"]
    for row, folder in zip(rows, (tiny_folder, tmp_path / "short"), strict=True):
        expected = [score.as_json() for score in evaluate(folder, ["choose", "write"], **options)]
        assert row["scores"] == expected
    assert "| choose | acc_norm, 0-shot | 5 |" in (tmp_path / "out.md").read_text()
