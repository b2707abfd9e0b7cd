"""Threads for what takes long, so that nothing else waits for it."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable
from typing import Final

from godwit.linux import interrupt, setfsuid
from godwit.residual.homefiles.messages import After, Later, Parts, fail
from godwit.types import Tid

_THREADS: Final = 4
_MAX_WAITING: Final = 1024
_AGAIN_S: Final = 0.005

Answer = Callable[[int, Callable[[], Parts | After]], None]
"""Calls the work of the request with this number, and sends what it returns or raises."""


class _Waiting:
    """A request whose thread may wait for ever."""

    __slots__ = ("is_done", "is_interrupted", "lock", "thread")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.is_done = False
        self.is_interrupted = False
        self.thread: threading.Thread | None = None

    def nudge(self) -> None:
        """End the call that the thread is in, unless the thread is done with it."""
        with self.lock:
            tid = self.thread.native_id if self.thread is not None else None
            if not self.is_done and tid is not None:
                interrupt.interrupt(Tid(tid))


class Workers:
    """A few threads for what ends by itself, and one for each request that does not."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._work: queue.SimpleQueue[tuple[int, Later] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._is_closed = False

    def submit(self, unique: int, later: Later) -> None:
        """Have a thread do the work. Raises OSError: ENOLCK, too many wait already."""
        if later.interruptible:
            held = later.held
            try:
                self._wait_for(unique, later)
            except OSError:
                if held is not None:
                    held.close()
                raise
            return
        self._work.put((unique, later))
        with self._lock:
            if self._idle == 0 and len(self._threads) < _THREADS:
                thread = threading.Thread(target=self._serve, name="files-work", daemon=True)
                self._threads.append(thread)
                self._idle += 1
                thread.start()
            self._idle = max(0, self._idle - 1)

    def interrupt(self, unique: int) -> None:
        """Have a waiting request fail with EINTR, if it still waits."""
        waiting = self._waiting.get(unique)
        if waiting is None:
            return
        waiting.is_interrupted = True
        # A signal that comes just before the thread's call is lost: somebody has to repeat it.
        threading.Thread(target=self._insist, args=[waiting], name="files-interrupt", daemon=True).start()

    def close(self) -> None:
        """End all threads; what waits fails with EINTR."""
        self._is_closed = True
        for waiting in list(self._waiting.values()):
            waiting.is_interrupted = True
            self._insist(waiting)
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            unique, later = item
            if later.identity is not None:
                setfsuid.become(*later.identity)
            self._answer(unique, later.work)
            with self._lock:
                self._idle += 1

    def _wait_for(self, unique: int, later: Later) -> None:
        if len(self._waiting) >= _MAX_WAITING or unique in self._waiting or self._is_closed:
            raise fail(errno.ENOLCK)
        interrupt.prepare()
        waiting = self._waiting[unique] = _Waiting()

        def work() -> Parts | After:
            try:
                return _until_interrupted(waiting, later.work)
            finally:
                with waiting.lock:
                    waiting.is_done = True
                if later.held is not None:
                    later.held.close()
                del self._waiting[unique]

        waiting.thread = threading.Thread(
            target=self._answer, args=[unique, work], name="files-wait", daemon=True
        )
        waiting.thread.start()

    def _insist(self, waiting: _Waiting) -> None:
        thread = waiting.thread
        assert thread is not None
        while not waiting.is_done:
            waiting.nudge()
            thread.join(_AGAIN_S)


def _until_interrupted(waiting: _Waiting, work: Callable[[], Parts | After]) -> Parts | After:
    while not waiting.is_interrupted:
        try:
            return work()
        except InterruptedError:
            continue
    raise fail(errno.EINTR)
