"""Work done in a forked child, so that whoever asked outlives it and can settle what it leaves.

ptrace and namespaces belong to the process that uses them; and a mover may be killed at any moment.
The child sends progress and its result as length-prefixed JSON; the parent may ask it to stop.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, NoReturn, TypeVar

import msgspec

from godwit.errors import GodwitError, InternalError, MigrationError, Survivor
from godwit.linux.pause import pause
from godwit.migrate.entries import ErrorEntry, error_entry, error_from
from godwit.migrate.report import Progress, ProgressEvent

Result = TypeVar("Result")
_TELL_EVERY_S: Final = 0.05
_LENGTH: Final = struct.Struct("<cI")
_PROGRESS: Final = b"p"
_PART: Final = b"i"
_RESULT: Final = b"r"
_ERROR: Final = b"e"


class WorkerDied(Exception):  # noqa: N818  # an event that callers settle, never an answer to the user
    """The child ended without a result. The argument is its wait status."""


class Line(Generic[Result]):
    """The child's end: what it tells its parent, and hears."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._stage = ""
        self._told = 0.0

    def progress(self, event: ProgressEvent) -> None:
        """Tell where the work stands. A parent that is gone is no error here.

        Of a stage that goes on, no more is told than eyes can follow: the parent's waking takes a CPU.
        """
        now = time.monotonic()
        if event.stage == self._stage and now - self._told < _TELL_EVERY_S:
            return
        self._stage, self._told = event.stage, now
        self._send(_PROGRESS, msgspec.json.encode(event))

    def part(self, value: object) -> None:
        """Tell a part of the result, of dataclasses, numbers and strings, ahead of the whole."""
        self._send(_PART, msgspec.json.encode(value))

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the parent asks to stop, or is gone."""
        return self._connection.fileno()

    def cancelled(self) -> bool:
        """Tell whether the parent asked to stop, or is gone."""
        return bool(select.select([self._connection], [], [], 0)[0])

    def give_up_if_cancelled(self) -> None:
        """Raise MigrationError if the parent asked to stop. Before the commit only."""
        if self.cancelled():
            raise MigrationError("interrupted; nothing was moved", survivor=Survivor.SOURCE)

    def wait(self, seconds: float) -> None:
        """Let some time pass. The parent's wish to stop does not end it."""
        pause(seconds)

    def _send(self, kind: bytes, body: bytes) -> None:
        try:
            self._connection.sendall(_LENGTH.pack(kind, len(body)) + body)
        except (BrokenPipeError, ConnectionResetError):
            return

    def finish(self, kind: bytes, body: bytes) -> None:
        """Send the last word."""
        self._send(kind, body)


def run(
    work: Callable[[Line[Result]], Result],
    kind: type[Result],
    progress: Progress,
    part: Callable[[bytes], None] = lambda _: None,
) -> Result:
    """Run `work` in a child and return what it returns. `part` gets what `Line.part` tells, as JSON.

    An interrupt (SIGINT) here asks the child to stop, waits for it, and is raised afterwards.

    Raises:
        GodwitError: As the child raised it.
        WorkerDied: It was killed.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become_worker(work, Line(theirs))
    theirs.close()
    interrupted = False
    outcome: tuple[bytes, bytes] | None = None
    status = -1

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        with contextlib.suppress(OSError):
            ours.send(b"c")

    with ours, _interrupts(interrupt):
        while outcome is None:
            try:
                message = _receive(ours)
                if message is None:
                    break
                if message[0] == _PROGRESS:
                    progress(msgspec.json.decode(message[1], type=ProgressEvent))
                elif message[0] == _PART:
                    part(message[1])
                else:
                    outcome = message
            except KeyboardInterrupt:
                interrupt()
        # A caller who ignores SIGCHLD has no children to wait for.
        with contextlib.suppress(ChildProcessError):
            _, status = os.waitpid(pid, 0)
    if outcome is None:
        raise WorkerDied(status)
    if outcome[0] == _ERROR:
        error = error_from(msgspec.json.decode(outcome[1], type=ErrorEntry))
        if interrupted and getattr(error, "survivor", Survivor.SOURCE) is Survivor.SOURCE:
            raise KeyboardInterrupt from error
        raise error
    return msgspec.json.decode(outcome[1], type=kind)


@contextlib.contextmanager
def _interrupts(noted: Callable[[], None]) -> Iterator[None]:
    """Have an interrupt noted, not raised: it would tear a message in two, or what is done about one."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def note(number: int, frame: object) -> None:
        del number, frame
        noted()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _receive(connection: socket.socket) -> tuple[bytes, bytes] | None:
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    kind, length = _LENGTH.unpack(head)
    body = _exactly(connection, length)
    return None if body is None else (kind, body)


def _exactly(connection: socket.socket, length: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _become_worker(work: Callable[[Line[Any]], Any], line: Line[Any]) -> NoReturn:
    # The terminal's interrupt goes to the parent, who asks us in a place where we can stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A short life: what is here stays, and no collection shall fall into a freeze.
    gc.freeze()
    gc.disable()
    status = 1
    try:
        line.finish(_RESULT, msgspec.json.encode(work(line)))
        status = 0
    except GodwitError as error:
        line.finish(_ERROR, msgspec.json.encode(error_entry(error)))
    except BaseException as error:  # noqa: BLE001  # carried to the parent, not swallowed
        import traceback

        text = "".join(traceback.format_exception(error))
        line.finish(_ERROR, msgspec.json.encode(error_entry(InternalError(text))))
    finally:
        os._exit(status)
