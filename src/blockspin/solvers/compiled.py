"""How the search kernels are compiled: once, kept on disk between runs, and free of the interpreter's lock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])

# numba finds a compiled kernel by the name and the file of its function, and does not see when a function that it calls
# in another file has changed: it would run old code with new data. So the sources of all kernels are in each name.
_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
_VERSION = hashlib.sha256(_SOURCES).hexdigest()[:12]


def compiled(function: Function) -> Function:
    """Compile at the first call, or load what an earlier process compiled; runs in threads side by side.

    Dividing by zero gives infinity, as in numpy: the check that Python asks for would keep loops from using vectors.
    """
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(_versioned(function)))


def compiled_for_scans(function: Function) -> Function:
    """As `compiled`, for loops that search or count: sums in any order and no NaN, so that they use vectors."""
    liberties = {"nnan", "nsz", "reassoc"}
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy", fastmath=liberties)(_versioned(function)))


def _versioned(function: Function) -> Function:
    function.__qualname__ += f"_{_VERSION}"
    return function
