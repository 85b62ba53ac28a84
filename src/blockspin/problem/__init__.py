"""The removal problem: which blocks may go, how many must, and what a removal costs."""

from __future__ import annotations

from .constraints import Budget, Floats, Ints, Removal, completion, rows_of
from .goals import Goal, check_goal, goal_name
from .problem import RemovalProblem
from .units import NOUNS, Block, Sublayer, Units, block_of, units_of
from .views import Reduced

__all__ = [
    "NOUNS",
    "Block",
    "Budget",
    "Floats",
    "Goal",
    "Ints",
    "Reduced",
    "Removal",
    "RemovalProblem",
    "Sublayer",
    "Units",
    "block_of",
    "check_goal",
    "completion",
    "goal_name",
    "rows_of",
    "units_of",
]
