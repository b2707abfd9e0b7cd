"""After the decision, while the last pages follow: the source's end, over as many lines as it takes.

The tree runs at the destination, and the copy here is its memory until all of it has gone over. So nothing
ends this but the end of the work or of one of the two: not a lost line, nor the user's interrupt.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Final

from godwit.engine.ranges import RangeSet
from godwit.errors import GodwitError, ImageError, MigrationError, Survivor
from godwit.images import codec
from godwit.linux.pause import pause
from godwit.migrate.channel import Channel
from godwit.migrate.entries import DrainedEntry, ErrorEntry, ResumeEntry, error_from
from godwit.migrate.pageserver import CopyLostError, Left, PageServer
from godwit.migrate.pagestream import buffer_of_pages
from godwit.migrate.patience import Patience
from godwit.migrate.timeline import DISABLED, Timeline
from godwit.types import OwnedFd, Pid
from godwit.wire import frames
from godwit.wire.frames import FrameKind

Reconnect = Callable[[], Channel]
_AGAIN_S: Final = (0.05, 0.2, 0.5, 1.0)
SILENT_S: Final = 20.0  # of a line that nobody can give up any more
_LEFT_TO_COME: Final = "the last pages are on their way"


def drain(
    migration: str,
    channel: Channel | None,
    left: dict[int, Left],
    connect: Reconnect,
    progress: Callable[[int], None],
    *,
    tries: int | None = None,
    timeline: Timeline = DISABLED,
) -> tuple[DrainedEntry, Channel, int]:
    """Serve pages until the destination has all; return what it told, the line it was told on, and the pages.

    Args:
        migration: Which move.
        channel: The line that there is, None for none.
        left: What is left, by index of the process.
        connect: Opens another line.
        progress: Told the bytes that are left.
        timeline: Where page faults are noted.
        tries: How often in a row to look for another line in vain; None: for ever.

    Raises:
        CopyLostError: The copy here was killed, and pages of it are lost.
        MigrationError: The destination does not know of it, or does not answer any more.
    """
    pages = in_vain = 0
    while True:
        if channel is None:
            channel = _resume(migration, left, connect, tries)
        server = PageServer(channel, left, buffer_of_pages(), progress, timeline)
        try:
            drained = server.serve()
        except OSError as error:
            channel.close()
            channel = None
            pages += server.pages
            in_vain = 0 if server.pages else in_vain + 1
            _again(in_vain, tries, error)
        except ImageError as error:
            channel.close()
            raise _unanswered(error) from error
        else:
            return drained, channel, pages + server.pages


def _resume(migration: str, left: dict[int, Left], connect: Reconnect, tries: int | None) -> Channel:
    """Open another line, and learn what is missing."""
    attempt = 0
    while True:
        try:
            channel = connect()
            be_patient(channel)
            with contextlib.ExitStack() as undo:
                undo.callback(channel.close)
                _hear_what_is_missing(migration, channel, left)
                undo.pop_all()
            return channel
        except MigrationError:
            raise
        except (GodwitError, OSError) as error:
            attempt += 1
            _again(attempt, tries, error)


def _again(attempt: int, tries: int | None, error: Exception) -> None:
    """Let some time pass before the next line, the longer the more were in vain; 0: none."""
    if tries is not None and attempt >= tries:
        raise _unanswered(error) from error
    if attempt:
        pause(_AGAIN_S[min(attempt, len(_AGAIN_S)) - 1])


def _unanswered(error: Exception) -> MigrationError:
    return MigrationError(
        f"it runs at the destination, which gives no answer that makes sense ({error}); {_LEFT_TO_COME}",
        survivor=Survivor.DESTINATION,
        remedy="the copy here holds them: run `godwit recover` when it can be reached again",
    )


def _turned_away(error: GodwitError) -> GodwitError:
    """Return what to raise: whatever the destination says now, the copy here is not the one that runs."""
    if not isinstance(error, MigrationError):
        return error
    return MigrationError(
        f"it runs at the destination: {error.message}", survivor=Survivor.DESTINATION, remedy=error.remedy
    )


def be_patient(channel: Channel) -> None:
    """Have a line end that falls silent. Where signals are another thread's, the kernel's timers must do."""
    if threading.current_thread() is threading.main_thread():
        channel.patience = Patience(lambda: None, SILENT_S)


def _hear_what_is_missing(migration: str, channel: Channel, left: dict[int, Left]) -> None:
    channel.open_stream()
    channel.send(FrameKind.RESUME, codec.encode(ResumeEntry(migration=migration)))
    channel.accept_stream()
    missing: dict[int, RangeSet] = {index: RangeSet() for index in left}
    while True:
        kind, payload = channel.expect(FrameKind.LEFT, FrameKind.RESUME, FrameKind.ABORT)
        if kind is FrameKind.RESUME:
            break
        if kind is FrameKind.ABORT:
            raise _turned_away(error_from(codec.decode(payload, ErrorEntry)))
        head = frames.read_runs(payload, FrameKind.LEFT)
        if head.process not in missing:
            raise CopyLostError
        for start, end in head.runs:
            missing[head.process].add(start, end)
    for index, found in missing.items():
        left[index].ranges = found


def left_of(pids: list[Pid]) -> dict[int, Left]:
    """Return stopped processes that may have pages left, by index; which, the destination will say.

    A dead one is named by 0: it has none to give.
    """
    return {
        index: Left(pid, OwnedFd(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)), RangeSet())
        for index, pid in enumerate(pids)
        if pid
    }
