"""`python -m blockspin` is the command `blockspin`."""

from __future__ import annotations

from .cli import main

main()
