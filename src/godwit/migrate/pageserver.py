"""Serving pages of a tree that runs elsewhere already: the source's end of post-copy.

The copy here stays stopped and keeps its memory until the last page has gone over. Pages that somebody waits
for go first, then their neighbours, then the rest in order; of those that nobody asked for, only so many are
under way that an answer need not queue behind them.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from godwit.engine import pages
from godwit.engine.ranges import Range, RangeSet
from godwit.errors import ImageError, MigrationError, Survivor
from godwit.images import codec
from godwit.linux import pagemap
from godwit.log import log
from godwit.migrate import faults
from godwit.migrate.channel import Channel, Closed
from godwit.migrate.entries import CreditEntry, DrainedEntry, ErrorEntry, error_from
from godwit.migrate.timeline import Timeline
from godwit.types import PAGE_SIZE, OwnedFd, Pid
from godwit.wire import frames
from godwit.wire.frames import FrameKind

PUSH_BYTES: Final = 1 << 16
_AHEAD_FRAMES: Final = 12
_AHEAD_OF_FAULTS: Final = 4
_CALM_S: Final = 2e-3  # since the last fault, until all of the line is used again
_LOOK_BYTES: Final = 4 << 20
_RECENT: Final = 16
_TELL_EVERY: Final = 256  # pushes
_KINDS: Final = (FrameKind.REQUEST, FrameKind.CREDIT, FrameKind.DRAINED, FrameKind.ABORT)


class CopyLostError(MigrationError):
    """The copy here was killed before its last pages had gone over."""

    def __init__(self) -> None:
        super().__init__(
            "it runs at the destination, and the copy here was killed before its last pages had gone over",
            survivor=Survivor.DESTINATION,
            remedy="the program there waits for ever once it needs one; end it, restart it from a checkpoint",
        )


@dataclass(slots=True)
class Left:
    """What is left behind of one process."""

    pid: Pid  # stopped here
    table: OwnedFd  # its /proc/PID/pagemap
    ranges: RangeSet


@dataclass(slots=True)
class PageServer:
    """Serves one running destination over one line, until it has everything."""

    channel: Channel
    left: dict[int, Left]  # by the process's index in the last TREE
    buffer: bytearray
    progress: Callable[[int], None]  # told the bytes that are still left
    timeline: Timeline
    pages: int = 0
    _sent: int = 0
    _credit: int = 0
    _told: int = 0
    _asked_at: float = 0.0
    _recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _over: DrainedEntry | None = None

    def serve(self) -> DrainedEntry:
        """Return when the destination awaits nothing any more; tell what it told.

        Raises:
            Closed, OSError: The line broke. What is left says what the destination may lack.
            CopyLostError: There is nothing to serve from any more.
        """
        try:
            return self._serve()
        except ProcessLookupError as error:
            raise CopyLostError from error

    def _serve(self) -> DrainedEntry:
        told = False
        while self._over is None:
            self._listen(wait=told or self._is_ahead())
            if self._over is not None or self._is_ahead() or self._must_wait():
                continue
            if not told and not self._push():
                self.channel.send(FrameKind.DRAINED, codec.encode(DrainedEntry()))
                told = True
        return self._over

    def _is_ahead(self) -> bool:
        """Tell whether so much is under way that an answer would come too late behind it."""
        waited_for = time.monotonic() - self._asked_at < _CALM_S
        return self._sent - self._credit >= (_AHEAD_OF_FAULTS if waited_for else _AHEAD_FRAMES)

    def _must_wait(self) -> bool:
        """Let the time pass that a limited line asks for, or less if the destination has a word."""
        delay_s = self.channel.delay_s()
        if delay_s:
            select.select([self.channel.fileno()], [], [], delay_s)
        return bool(delay_s)

    def _listen(self, *, wait: bool) -> None:
        while wait or self.channel.has_word():
            kind, payload = self.channel.expect(*_KINDS)
            wait = False
            if kind is FrameKind.ABORT:
                # Its pager cannot go on: another one may.
                raise Closed(error_from(codec.decode(payload, ErrorEntry)).message)
            if kind is FrameKind.DRAINED:
                self._over = codec.decode(payload, DrainedEntry)
                return
            if kind is FrameKind.CREDIT:
                self._credit = codec.decode(payload, CreditEntry).frames
            else:
                self._answer(payload)

    def _answer(self, payload: memoryview) -> None:
        began_ns = self.timeline.now()
        self._asked_at = time.monotonic()
        self.channel.urgent = True
        head = frames.read_runs(payload, FrameKind.REQUEST)
        left = self.left.get(head.process)
        if left is None or head.pages_bytes > PUSH_BYTES:
            raise ImageError("the destination asks for pages that there never were")
        for start, end in head.runs:
            taken = left.ranges.remove(start, end)
            if taken:
                self._send(head.process, taken)
            elif not self._present(left, start, end):
                self.channel.send(FrameKind.ZEROES, frames.pages_head(head.process, 0, [(start, end)]))
                self._sent += 1
            # Else it is on its way.
            self._recent.append((head.process, start // PUSH_BYTES * PUSH_BYTES))
            self.timeline.fault(began_ns, self.timeline.now(), start)
        self.channel.urgent = False

    def _push(self) -> bool:
        """Send some of what is left; tell whether there was anything."""
        faults.at("source", "pushed")
        while self._recent:
            index, at = self._recent.pop()
            around = self.left[index].ranges.within(at, at + PUSH_BYTES)
            if around:
                self._send_some(index, *around[0])
                return True
        for index, left in self.left.items():
            first = left.ranges.first()
            if first is not None:
                self._send_some(index, *first)
                return True
        return False

    def _send_some(self, index: int, start: int, end: int) -> None:
        """Send what there is at the beginning of a range; what there is not is left no longer."""
        left = self.left[index]
        end = min(end, start + _LOOK_BYTES)
        wanted: list[Range] = []
        room = PUSH_BYTES
        reached = end
        for first, beyond, own in pagemap.scan_present(
            left.table.number, start, end, written=False, protect=False
        ):
            if not own:
                continue
            take = min(beyond, first + room)
            wanted.append((first, take))
            room -= take - first
            if not room:
                reached = take
                break
        left.ranges.remove(start, reached)
        if wanted:
            self._send(index, wanted)
        self._told -= 1
        if self._told < 0:
            # Counting what is left takes long when it is in many pieces.
            self._told = _TELL_EVERY
            self.progress(sum(each.ranges.total() for each in self.left.values()))

    def _send(self, index: int, runs: Sequence[Range]) -> None:
        """Send pages. One that is not there reads as zeroes, and is."""
        view = memoryview(self.buffer)
        left = self.left[index]
        try:
            length = pages.read_frozen(left.pid, runs, view)
        except OSError:
            length = _read_singly(left, runs, view)
        self.channel.send(FrameKind.PAGES, frames.pages_head(index, 0, runs), view[:length])
        self._sent += 1
        self.pages += length // PAGE_SIZE

    @staticmethod
    def _present(left: Left, start: int, end: int) -> bool:
        found = pagemap.scan_present(left.table.number, start, end, written=False, protect=False)
        return any(own for _, _, own in found)


def _read_singly(left: Left, runs: Sequence[Range], into: memoryview) -> int:
    """Read page by page; a guard page, made in the last moment, stays zero.

    The tree runs elsewhere by now, and must not wait for ever for what lies behind it. Whatever else cannot
    be read is no page of zeroes, but the error that it is.
    """
    at = 0
    for start, end in runs:
        for page in range(start, end, PAGE_SIZE):
            part = into[at : at + PAGE_SIZE]
            try:
                pages.read_frozen(left.pid, [(page, page + PAGE_SIZE)], part)
            except OSError:
                if not pagemap.has_guard_pages(left.table.number, page, page + PAGE_SIZE):
                    raise
                log.warning("a guard page at %#x of pid %d is a page of zeroes where it runs", page, left.pid)
                part[:] = bytes(PAGE_SIZE)
            at += PAGE_SIZE
    return at
