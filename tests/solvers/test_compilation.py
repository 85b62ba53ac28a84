"""Kernels are compiled before the clock of a solver starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own, because others have compiled kernels already.
_SCRIPT = """
import sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from blockspin import Block, RemovalProblem
from blockspin.solvers import SOLVERS, compile_kernels

def compiled():
    kernels = {}
    for name in [name for name in sys.modules if name.startswith("blockspin.solvers")]:
        for function, value in vars(sys.modules[name]).items():
            if isinstance(value, Dispatcher):
                kernels[name, function] = len(value.signatures)
    return kernels

columns = np.random.default_rng(1).normal(size=(24, 24))
compile_kernels(sys.argv[1], True)
before = compiled()
for problem in (RemovalProblem(columns.T @ columns, remove=6), RemovalProblem(columns.T @ columns, remove=1)):
    SOLVERS[sys.argv[1]](problem, 20, None, 0)
assert sum(before.values()) > 0
assert compiled() == before

# A share of the parameters is another kind of constraint.
blocks = [Block(i, "block", i % 3 + 1) for i in range(16)]
compile_kernels(sys.argv[1], False)
before = compiled()
share = RemovalProblem((columns.T @ columns)[:16, :16], remove_parameters=0.25, blocks=blocks)
assert not share.reduced.exactly
SOLVERS[sys.argv[1]](share, 20, None, 0)
assert compiled() == before
"""


@pytest.mark.parametrize("solver", ["tabu", "anneal", "enumerate", "exact"])
def test_small_problems_compile_every_kernel_that_large_ones_need(solver: str) -> None:
    subprocess.run([sys.executable, "-c", _SCRIPT, solver], check=True)
