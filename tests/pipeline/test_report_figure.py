"""The picture of a run shows what was chosen, also where that is not the lowest measured removal."""

from __future__ import annotations

import numpy as np

from blockspin.pipeline.report import choice_figure
from blockspin.selection.result import Selection, Trial
from blockspin.solvers.candidates import Candidate


def test_the_filled_point_is_the_choice() -> None:
    lowest = Trial((1, 2), "CBO:0", 0.1, 0.30, 0.01, 8, -0.01, 0.01)
    taken = Trial((1, 5), "CBO:1", 0.2, 0.31, 0.01, 8, 0.0, 0.0)
    chosen = Candidate(taken.removed, taken.source, taken.energy, taken.loss)
    axes = choice_figure(Selection(chosen, (lowest, taken), "kl", 2.0, 1.0)).axes[0]
    (point,) = [line for line in axes.lines if str(line.get_label()).startswith("chosen")]
    assert np.array_equal(point.get_xydata(), [[0.2, 0.31]])
    assert point.get_label() == "chosen: 1,5"
