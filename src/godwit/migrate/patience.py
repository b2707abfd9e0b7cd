"""How long to wait for the other side, and when to stop waiting.

A peer that is alive and silent keeps a blocking call waiting for ever, and our process frozen. While a
call on the channel blocks, a timer looks every quarter of a second whether there is still reason to wait;
nowhere else does it interrupt anything.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Final

LOOK_EVERY_S: Final = 0.25
SILENCE_S: Final = 60.0


class SilentError(ConnectionError):
    """The other side has said nothing for too long."""


class Patience:
    """Limits every blocking call of a channel. Belongs to a process's main thread.

    Args:
        check: Called while a call blocks; what it raises ends the call and the conversation.
        silence_s: How long one call may block.
    """

    def __init__(self, check: Callable[[], None], silence_s: float = SILENCE_S) -> None:
        self._check = check
        self._silence_s = silence_s
        self._since = 0.0
        self.look_every_s = LOOK_EVERY_S
        signal.signal(signal.SIGALRM, self._look)

    def commit(self, silence_s: float) -> None:
        """From now on only silence ends a call: nobody can take the decision back."""
        self._check = lambda: None
        self._silence_s = silence_s

    def check(self) -> None:
        """Raise if there is no reason to go on."""
        self._check()

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """Watch over the block."""
        self._since = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, self.look_every_s, self.look_every_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _look(self, number: int, frame: object) -> None:
        del number, frame
        self._check()
        if time.monotonic() - self._since > self._silence_s:
            raise SilentError(f"not a word for {self._silence_s:.0f} s")
