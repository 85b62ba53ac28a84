"""When a search must end before it is done: a time limit, or Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import numpy as np


class Stop:
    """While it is entered, the first Ctrl-C asks the search to end; a second one raises KeyboardInterrupt.

    flag (1,) is 1 as soon as expired() has found a reason to stop; compiled code running in other threads watches it.
    """

    def __init__(self, time_limit: float | None) -> None:
        self.flag = np.zeros(1, np.int64)
        self._deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        self._reason = ""
        self._previous: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.flag[0] = 1
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._reason:
            raise KeyboardInterrupt
        self._reason = "interrupted"

    def expired(self) -> bool:
        """Whether the search must end now."""
        if not self._reason and time.monotonic() > self._deadline:
            self._reason = "time limit"
        self.flag[0] = bool(self._reason)
        return bool(self._reason)

    def reason(self) -> dict[str, float | int | str]:
        """What to add to the statistics."""
        return {"stopped": self._reason} if self._reason else {}
