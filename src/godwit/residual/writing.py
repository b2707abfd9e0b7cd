"""Who writes to the connection of a link: one thread at a time, and it writes what others add meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from godwit.residual.line import Line
from godwit.residual.tally import Tally
from godwit.wire import linkframes


class Turn:
    """The turn to write. Who has got it by `begin` hands it back by one of the other calls.

    Args:
        tally: Where the messages are; only looked at under the lock.
        lock: The link's.
        changed: Notified when the turn is free; of the same lock.
        lose: Called without the lock when a write has failed.
    """

    def __init__(
        self,
        tally: Tally,
        lock: threading.Lock,
        changed: threading.Condition,
        lose: Callable[[Line, BaseException], None],
    ) -> None:
        self.tally = tally
        self.taken = False
        self.wrote_s = time.monotonic()
        self.errand = threading.Condition(lock)  # for the tender alone: it always waits
        self._until = 0  # count of messages sent when the turn began
        self._lock = lock
        self._changed = changed
        self._lose = lose

    def begin(self, line: Line | None) -> bool:
        """Take the turn, under the lock. Returns False if another has it or there is nothing to write to."""
        if self.taken or line is None or line.lost is not None:
            return False
        self.taken = True
        self._until = self.tally.sent
        return True

    def write_out(self, line: Line, *, for_ever: bool = False) -> None:
        """Write all that was there when the turn began, or until the connection is lost.

        What others add meanwhile is written with it, but not for ever: then the tender goes on, who does.
        """
        while True:
            with self._lock:
                left = self.tally.unwritten
                if left and self.tally.sent - left >= self._until and not for_ever:
                    self._hand_over()
                    return
                batch = self.tally.take() if line.lost is None else []
                if not batch:
                    self._hand_back()
                    return
                self.wrote_s = time.monotonic()
            try:
                line.pipe.writev(batch)
            except OSError as error:
                self._lose(line, error)

    def write_without_waiting(self, line: Line, length_bytes: int) -> None:
        """Write a message of so many bytes if the kernel takes it at once and no other is before it.

        If not, the tender does.
        """
        # The peer's reader may wait in its write as ours would in this one: then nobody would read.
        if self.tally.unwritten <= 1 and line.pipe.writable(length_bytes + linkframes.HEADER_BYTES):
            self.write_out(line)
            return
        with self._lock:
            self._hand_over()

    def _hand_over(self) -> None:
        self.tally.word_due = True
        self._hand_back()
        self.errand.notify()

    def _hand_back(self) -> None:
        self.taken = False
        self._changed.notify_all()
