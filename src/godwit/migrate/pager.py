"""Serving the missing pages of processes that run here already: the destination's end of post-copy.

One thread: it answers page faults by asking the source, puts in place what comes, and follows what the
program does to its memory meanwhile. When the line breaks it ends, and whoever waits for a page goes on
waiting: the userfaultfds stay open in the pod's init, and a successor goes on from what `pending` holds.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from godwit.images import codec
from godwit.linux import mem, userfaultfd
from godwit.linux.arch import USER_SPACE_END
from godwit.linux.userfaultfd import Message
from godwit.migrate import faults
from godwit.migrate.channel import Channel
from godwit.migrate.entries import CreditEntry, DrainedEntry
from godwit.migrate.pending import Pending, Space
from godwit.types import PAGE_SIZE, OwnedFd
from godwit.wire import frames
from godwit.wire.frames import FrameKind

if TYPE_CHECKING:
    from godwit.wire.packing import Unpacker

_CREDIT_EVERY: Final = 4
_LOWEST: Final = 1 << 16  # no mapping lies lower: vm.mmap_min_addr
_LATENCIES_KEPT: Final = 100_000
_LOOK_AGAIN_MS: Final = 1000
_KINDS: Final = (FrameKind.PAGES, FrameKind.ZEROES, FrameKind.COPIES, FrameKind.PACKED, FrameKind.DRAINED)
_GONE: Final = (errno.ESRCH, errno.ENOSPC)


@dataclass(slots=True)
class Pager:
    """Serves all processes of one move over one line."""

    channel: Channel
    pending: Pending
    uffds: dict[int, OwnedFd]  # by number of the space
    unpacker: Unpacker
    adopt: Callable[[OwnedFd], int]  # has the pod's init hold a userfaultfd too; returns its number there
    _asked: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    _waits_ns: list[int] = field(default_factory=list[int])
    _faults: int = 0
    _frames: int = 0
    _poll: select.poll = field(default_factory=select.poll)

    def run(self) -> None:
        """Return when nothing is missing any more; `finish` then says so.

        Raises:
            Closed, OSError: The line broke. What is missing stays missing, and who waits for it waits.
            ImageError: The source sends nonsense.
        """
        for uffd in self.uffds.values():
            self._poll.register(uffd.number, select.POLLIN)
            # Whoever asked a pager before us asks again.
            userfaultfd.wake(uffd.number, _LOWEST, USER_SPACE_END)
        self._poll.register(self.channel.fileno(), select.POLLIN)
        while self._living() and not self._step():
            pass
        for space in self.pending.spaces.values():
            # Of what the source has not sent there is nothing: who touches it gets zeroes.
            for start, end in [part for found in space.pending.values() for part in found]:
                self.pending.gone(space, start, end)
                self._look_again(space, start, end)
        self._poll.unregister(self.channel.fileno())
        faults.at("destination", "drained")

    def step(self) -> None:
        """Deal with what the programs do, for a moment, when nothing comes any more."""
        self._hear({fd for fd, _ in self._poll.poll(_LOOK_AGAIN_MS)})

    def finish(self, resumed_ms: float) -> DrainedEntry:
        """Tell the source that nothing is awaited any more."""
        entry = self._summary(resumed_ms)
        self.channel.send(FrameKind.DRAINED, codec.encode(entry))
        return entry

    def close(self) -> None:
        """Close our userfaultfds; the pod's init still holds its own."""
        for uffd in self.uffds.values():
            uffd.close()
        self.uffds.clear()

    def _living(self) -> bool:
        return any(not space.dead for space in self.pending.spaces.values())

    def _step(self) -> bool:
        """Wait for something and deal with it; tell whether the source has nothing left."""
        ready: set[int] = set()
        if not self.channel.has_word():
            ready = {fd for fd, _ in self._poll.poll(_LOOK_AGAIN_MS)}
        self._hear(ready)
        if not ready:
            self._bury()
        if not self.channel.has_word():
            return False
        kind, payload = self.channel.expect(*_KINDS)
        if kind is FrameKind.DRAINED:
            return True
        self._take(kind, payload)
        # A thread may have waited while we read.
        for number in list(self.uffds):
            self._messages(number)
        return False

    # --- what comes ---------------------------------------------------------------------------

    def _take(self, kind: FrameKind, payload: memoryview) -> None:
        for process, _, runs, data in self.unpacker.unpack(kind, payload):
            at = 0
            address = mem.address_of(data) if data is not None else 0
            for start, end in runs:
                self._place(process, start, end, address + at if address else 0)
                at += end - start
        faults.at("destination", "paged")
        self._frames += 1
        # At once when nothing more is on its way: the source may be waiting for just this.
        if self._frames % _CREDIT_EVERY == 0 or not self.channel.has_word():
            self.channel.send(FrameKind.CREDIT, codec.encode(CreditEntry(frames=self._frames)))

    def _place(self, process: int, start: int, end: int, address: int) -> None:
        """Put pages of a process at the source wherever they are pending. `address` 0: they are zero."""
        # Asked anew each time: children are born and mappings moved in between, and each page comes once.
        while (found := self.pending.wanting(process, start, end)) is not None:
            space, shift, first, beyond = found
            offset = first - shift - start
            done = self._fill_some(space, first, beyond, address + offset if address else 0)
            if done:
                self.pending.gone(space, first, first + done)
                self._answered(space, first, first + done)
            else:
                # The program is changing its mappings, and waits for us to hear of it.
                self._messages(space.number)

    def _fill_some(self, space: Space, start: int, end: int, address: int) -> int:
        """Fill as much as goes at once; return the bytes that are there now, or cannot be."""
        uffd = self.uffds[space.number].number
        try:
            if address:
                return userfaultfd.copy(uffd, start, address, end - start)
            return userfaultfd.zero(uffd, start, end - start)
        except FileNotFoundError:
            # The range lies in two mappings, which the kernel does not take at once; or it is unmapped, and
            # the message is on its way.
            if end - start > PAGE_SIZE:
                return self._fill_some(space, start, start + PAGE_SIZE, address)
            userfaultfd.wake(uffd, start, end)
            return PAGE_SIZE
        except FileExistsError:
            # There already. Who waits finds out himself.
            userfaultfd.wake(uffd, start, start + PAGE_SIZE)
            return PAGE_SIZE
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._end_of(space)
            return 0

    def _end_of(self, space: Space) -> None:
        self.pending.dead(space)
        uffd = self.uffds.pop(space.number, None)
        if uffd is not None:
            self._poll.unregister(uffd.number)
            uffd.close()

    def _bury(self) -> None:
        """Find out about address spaces that have ended while nothing came for them."""
        for number, uffd in list(self.uffds.items()):
            if not userfaultfd.is_alive(uffd.number):
                self._end_of(self.pending.spaces[number])

    def _hear(self, ready: set[int]) -> None:
        for number in [number for number, uffd in self.uffds.items() if uffd.number in ready]:
            self._messages(number)

    # --- what the programs do -----------------------------------------------------------------

    def _messages(self, number: int) -> None:
        uffd = self.uffds.get(number)
        if uffd is None:
            return
        space = self.pending.spaces[number]
        with self.pending.reading(space, uffd.number) as found:
            waiting = [message for message in found if message.event == userfaultfd.UFFD_EVENT_PAGEFAULT]
            for message in found:
                if message.event != userfaultfd.UFFD_EVENT_PAGEFAULT:
                    self._note(space, message)
        for message in waiting:
            self._fault(space, message.second & -PAGE_SIZE)

    def _note(self, space: Space, message: Message) -> None:
        if message.event == userfaultfd.UFFD_EVENT_FORK:
            child = OwnedFd(message.first & 0xFFFFFFFF)
            made = self.pending.forked(space, self.adopt(child))
            self.uffds[made.number] = child
            self._poll.register(child.number, select.POLLIN)
            return
        self.pending.note(space, message)
        end = message.first + message.third
        if message.event != userfaultfd.UFFD_EVENT_REMAP:
            end = message.second
        self._look_again(space, message.first, end)

    def _look_again(self, space: Space, start: int, end: int) -> None:
        """Have who waits for a page of a range try once more: the page is another one by now."""
        for key in [key for key in self._asked if key[0] == space.number and start <= key[1] < end]:
            del self._asked[key]
            if space.number in self.uffds:
                userfaultfd.wake(self.uffds[space.number].number, key[1], key[1] + PAGE_SIZE)

    def _fault(self, space: Space, page: int) -> None:
        self._faults += 1
        source = space.source_of(page)
        if source is None:
            if not self._fill_some(space, page, page + PAGE_SIZE, 0) and not space.dead:
                # The program is changing its mappings: after that message it faults once more.
                userfaultfd.wake(self.uffds[space.number].number, page, page + PAGE_SIZE)
            return
        if (space.number, page) in self._asked:
            return
        self._asked[space.number, page] = time.monotonic_ns()
        run = [(source, source + PAGE_SIZE)]
        self.channel.send(FrameKind.REQUEST, frames.pages_head(space.source, 0, run))

    def _answered(self, space: Space, start: int, end: int) -> None:
        if not self._asked:
            return
        now = time.monotonic_ns()
        for page in range(start, end, PAGE_SIZE):
            asked = self._asked.pop((space.number, page), None)
            if asked is not None and len(self._waits_ns) < _LATENCIES_KEPT:
                self._waits_ns.append(now - asked)

    def _summary(self, resumed_ms: float) -> DrainedEntry:
        waits = sorted(self._waits_ns) or [0]
        return DrainedEntry(
            resumed_ms=resumed_ms,
            faults=self._faults,
            median_us=round(waits[len(waits) // 2] / 1000, 1),
            p99_us=round(waits[len(waits) * 99 // 100] / 1000, 1),
        )
