"""The paper's benchmarks as the harness's own command runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from offline_tasks import write_tasks

from blockspin import evaluate
from blockspin.config import PAPER_TASKS
from blockspin.demo import MODEL
from blockspin.evaluation import harness
from blockspin.evaluation.scores import scores_table

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    harness._indexed.cache_clear()
    return write_tasks(tmp_path_factory.mktemp("offline"), data_folder)


def test_a_real_run_of_two_benchmarks(offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = evaluate(
        MODEL, ["arc_challenge", "gsm8k"], include_path=str(offline), limit=4, max_gen_tokens=32, cache=None
    )
    with capsys.disabled():
        print()
        print(scores_table({"embedded model": scores}).text(120))
    assert [score.task for score in scores] == ["arc_challenge", "gsm8k"]
    assert scores[0].metric == "acc_norm"
    assert scores[1].metric == "exact_match (strict-match)"
    assert [score.num_samples for score in scores] == [4, 4]
    assert scores[0].chance == pytest.approx(0.25, abs=0.05)  # a few questions have three or five answers


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_six_benchmarks_as_the_command_of_the_harness_runs_them(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours against `lm_eval run` on the same checkpoint, questions and batch size."""
    scores = evaluate(MODEL, include_path=str(offline), limit=4, max_gen_tokens=32, batch_size=8, cache=None)
    with capsys.disabled():
        print()
        print(scores_table({"embedded model": scores}).text(120))
    arguments = ["--model", "hf", "--model_args", f"pretrained={MODEL},dtype=float32", "--tasks", *PAPER_TASKS]
    arguments += ["--include_path", str(offline), "--limit", "4", "--batch_size", "8", "--device", "cpu"]
    arguments += ["--gen_kwargs", "max_gen_toks=32", "--output_path", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-m", "lm_eval", "run", *arguments], check=True)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    assert [score.task for score in scores] == list(PAPER_TASKS)
    for score in scores:
        metric, _, chosen = score.metric.rstrip(")").partition(" (")
        assert score.value == theirs[score.task][f"{metric},{chosen or 'none'}"]
        assert score.stderr == pytest.approx(theirs[score.task][f"{metric}_stderr,{chosen or 'none'}"], rel=1e-9)
