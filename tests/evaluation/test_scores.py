"""Scores: the mark of guessing, their mean, their table."""

from __future__ import annotations

import pytest

from blockspin.evaluation.scores import Score, mean_scores, scores_table


def test_mark_of_scores_at_chance() -> None:
    score = Score("t", "acc", 0.269, 0.01, 0.25, 10_000, 0)
    assert score.at_chance
    assert score.as_text() == "26.9 ±1.0*"
    assert not Score("t", "acc", 0.28, 0.01, 0.25, 10_000, 0).at_chance
    assert Score("t", "acc", 0.0, 0.0, 0.25, 4, 0).at_chance  # nothing right of four is what guessing often gets
    assert not Score("t", "acc", 0.0, 0.0, 0.25, 400, 0).at_chance
    assert Score("t", "exact_match", 0.0, 0.0, 0.0, 100, 5).at_chance
    perplexity = Score("t", "word_perplexity", 12.5, None, None, 10, 0)
    assert not perplexity.at_chance
    assert perplexity.as_text() == "12.5000 ±–"  # the harness gives no error of it


def test_mean_of_scores() -> None:
    drawn = [(Score("t", "acc", 0.2, 0.03, 0.25, 100, 0),), (Score("t", "acc", 0.4, 0.04, 0.25, 100, 0),)]
    (mean,) = mean_scores(drawn)
    assert mean.value == pytest.approx(0.3)
    assert mean.stderr == pytest.approx(0.025)
    assert mean_scores([(), ()]) == ()


def test_tables_show_models_side_by_side() -> None:
    ours = [Score("gsm8k", "exact_match", 0.5, 0.1, 0.0, 20, 5, (0.4, 0.6))]
    theirs = [Score("gsm8k", "exact_match", 0.0, 0.0, 0.0, 20, 5)]
    table = scores_table({"whole": ours, "short": theirs})
    markdown = table.markdown()
    assert "| gsm8k | exact_match, 5-shot, mean of 2 rollouts | 20 | 0.0 | 50.0 ±10.0 | 0.0 ±0.0* |" in markdown
    assert "two standard errors" in table.text(120)
