"""How the search kernels are compiled: once, kept on disk between runs, and free of the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile at the first call, or load what an earlier process compiled; runs in threads side by side.

    Dividing by zero gives infinity, as in numpy: the check that Python asks for would keep loops from using vectors.
    """
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))


def compiled_for_scans(function: Function) -> Function:
    """The same for loops that search or count: no "not a number", sums in any order, so that they use vectors."""
    liberties = {"nnan", "nsz", "reassoc"}
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy", fastmath=liberties)(function))
