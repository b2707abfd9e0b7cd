"""A step of a move that waits for the test: a disaster then happens exactly there, and only once.

The process that reaches the step named in the environment tells so on a socket, and goes on when the test
hangs up. Imported by `mover`, in the processes of both ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Final

from godwit.migrate import commit, draining, faults, patience

STEP: Final = "GODWIT_TEST_STEP"  # role:step:the how manieth time
BELL: Final = "GODWIT_TEST_BELL"
PATIENCE: Final = "GODWIT_TEST_PATIENCE_S"


def install() -> None:
    """Have this process, and those it forks, wait where the environment says."""
    if PATIENCE in os.environ:
        seconds = float(os.environ[PATIENCE])
        patience.Patience.__init__.__defaults__ = (seconds,)
        vars(commit)["_SILENT_S"] = seconds
        vars(commit)["_ASK_AGAIN_S"] = 3 * seconds
        vars(draining)["_SILENT_S"] = seconds
    if STEP not in os.environ:
        return
    *where, time_ = os.environ[STEP].split(":")
    wanted = int(time_)
    count = 0

    def ring(role: str, step: str) -> None:
        nonlocal count
        if [role, step] != where:
            return
        count += 1
        if count == wanted:
            _ring(os.environ[BELL])

    faults.at = ring


def _ring(name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line, contextlib.suppress(OSError):
        # A name in no directory: a pod's builder sees other mounts.
        line.connect(f"\0{name}")
        line.send(str(os.getpid()).encode())
        line.recv(1)


class Bell:
    """The test's end."""

    def __init__(self) -> None:
        self.name = f"godwit-bell-{os.urandom(8).hex()}"
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.bind(f"\0{self.name}")
        self._server.listen(8)

    def environment(self, step: str) -> dict[str, str]:
        return {STEP: step, BELL: self.name}

    @contextlib.contextmanager
    def rung(self, over: int, deadline_s: float) -> Iterator[int]:
        """Yield the pid of who rang, who waits until the block ends; 0 if the process `over` ends first."""
        end = time.monotonic() + deadline_s
        self._server.settimeout(0.05)
        line = None
        while line is None and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                line, _ = self._server.accept()
            if line is None and os.waitid(os.P_PID, over, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        # Nobody waits here a second time.
        self._server.close()
        if line is None:
            yield 0
            return
        with line:
            yield int(line.recv(32))

    def close(self) -> None:
        self._server.close()


def end(pid: int) -> None:
    """Kill a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
