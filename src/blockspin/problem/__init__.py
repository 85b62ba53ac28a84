"""The removal problem: which blocks may go, how many must, and what a removal costs."""

from __future__ import annotations

from .goals import Floats, Goal, Ints, Removal, check_goal
from .problem import RemovalProblem
from .units import Block, Sublayer, Units, block_of, units_of
from .views import Reduced

__all__ = [
    "Block",
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
    "units_of",
]
