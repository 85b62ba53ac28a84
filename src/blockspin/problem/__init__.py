"""The removal problem: which blocks may go, how many must, and what a removal costs."""

from __future__ import annotations

from .goals import Block, Floats, Goal, Ints, Removal, check_goal
from .problem import RemovalProblem
from .views import Reduced

__all__ = ["Block", "Floats", "Goal", "Ints", "Reduced", "Removal", "RemovalProblem", "check_goal"]
