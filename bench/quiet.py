"""Waiting until nobody else works on this machine, for a while at most."""

from __future__ import annotations

import select
import time
from typing import Final

_WINDOW_MS: Final = 30
_BUSY_SHARE: Final = 0.1
_PATIENCE_S: Final = 3.0


def wait() -> None:
    """Return once the processors have been idle for 30 ms, or after 3 s."""
    deadline = time.monotonic() + _PATIENCE_S
    window = select.poll()
    while time.monotonic() < deadline:
        busy_before, all_before = _ticks()
        window.poll(_WINDOW_MS)
        busy, total = _ticks()
        if busy - busy_before <= _BUSY_SHARE * (total - all_before):
            return


def _ticks() -> tuple[int, int]:
    """Return the processors' busy ticks and all ticks, proc_stat(5)."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)
