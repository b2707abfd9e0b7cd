"""Which pages a running program has changed: write protection that never stops it.

userfaultfd(2) with UFFD_FEATURE_WP_ASYNC, made by an injected call and used from outside; ioctl
PAGEMAP_SCAN tells what was written and protects it again. The first write to a page after that costs the
program 1-2 µs, and nothing else does. Closing the descriptor, or our death, ends it without a trace.

What the kernel drops without a word (munmap and mmap at the same place, mremap, exec) shows as a range
that is not tracked any more: it counts as new, and everything in it is told once more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from godwit.engine import freeze, ranges
from godwit.engine.freeze import FrozenTree
from godwit.engine.ranges import Range, Ranges
from godwit.engine.view import ProcessView
from godwit.linux import pagemap, pidfd, userfaultfd
from godwit.resources import memory
from godwit.tracee import calls, gadgets
from godwit.tracee.gadgets import Gadgets
from godwit.tracee.task import Tracee
from godwit.types import Fd, OwnedFd, Pid

# Holes this small between written runs are walked through rather than round.
_GAP_BYTES: Final = 1 << 18
_FEATURES: Final = userfaultfd.UFFD_FEATURE_WP_ASYNC | userfaultfd.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.UFFD_USER_MODE_ONLY


GadgetsOf = Callable[[ProcessView], Gadgets | None]


@dataclass(frozen=True, slots=True)
class Changes:
    """What a scan has found since the one before, of one address space."""

    dirty: list[Range]  # pages of its own, to be sent
    gone: list[Range]  # pages that may have been sent and are not there any more


@dataclass(slots=True)
class Tracked:
    """The address space of one process under watch."""

    pid: Pid
    image: tuple[int, ...]  # tells one program from the next that exec(2) puts in its place
    uffd: OwnedFd
    pagemap: OwnedFd
    covered: list[Range] = field(default_factory=list[Range])
    """What is tracked, and whose pages have all been told."""
    _holes: list[Range] = field(default_factory=list[Range])
    """Where in it there was nothing to tell, or what was told is known to have gone."""
    _given_up_early: list[Range] = field(default_factory=list[Range])
    _over_files: list[Range] = field(default_factory=list[Range])
    """What was told of mappings of files: there the kernel hides it when a page is given up."""

    def close(self) -> None:
        """End the watch."""
        self.uffd.close()
        self.pagemap.close()

    def give_up(self, dense: Ranges) -> None:
        """Have everything in these ranges told again, right before a freeze."""
        self.forget(dense)
        self._given_up_early = list(dense)

    def forget(self, lost: Ranges) -> None:
        """Have everything in these ranges told again."""
        self.covered = ranges.subtract(self.covered, lost)

    def scan(self, spans: Ranges, backed: Ranges, *, protect: bool) -> Changes:
        """Tell what has changed since the last scan.

        Args:
            spans: The private mappings, one range each, as they are now.
            backed: Those of them that lie over a file.
            protect: The program runs on: what it writes from now on is for the next scan. Without, it is
                stopped, and this is the last one.
        """
        found = _Scan(self.pagemap.number, protect=protect)
        self.covered = ranges.intersect(self.covered, ranges.union(spans))
        for group in _neighbours(spans):
            whole = (group[0][0], group[-1][1])
            if ranges.intersect([whole], self.covered) == [whole] and found.covered(whole):
                continue
            for span in group:
                self._scan_mapping(span, found)
        self.covered = ranges.subtract(self.covered, found.torn)
        gone, doubtful = self._given_up(spans, found.own)
        own = ranges.union([*found.own, *doubtful])
        absent = ranges.subtract(ranges.union(found.absent), self._holes)
        gone = ranges.subtract(ranges.union([*absent, *found.new, *gone]), doubtful)
        # An image may follow that goes on from here: what came up right before a freeze may go again.
        self._holes = ranges.subtract(ranges.union([*self._holes, *gone]), own)
        if not protect:
            return Changes(own, gone)
        kept = ranges.subtract(self._over_files, gone)
        self._over_files = ranges.union([*kept, *ranges.intersect(own, backed)])
        return Changes(own, gone)

    def _given_up(self, spans: Ranges, own: Ranges) -> tuple[list[Range], list[Range]]:
        """Return where a page over a file was told, and the file shows again; and where it may be so.

        When such a page goes, as by madvise(2) MADV_DONTNEED, the kernel leaves its write protection behind
        in a marker, so it never shows as written. A marker looks like a page that is swapped out: what looks
        so is told again. Of other memory the kernel leaves nothing behind.
        """
        told = ranges.intersect(self._over_files, ranges.union(spans))
        there, doubtful = list(own), list[Range]()
        for start, end in ranges.coalesce(told, _GAP_BYTES):
            present = pagemap.scan_present(self.pagemap.number, start, end, written=False, protect=False)
            there += [(first, beyond) for first, beyond, is_own in present if is_own]
            doubtful += pagemap.scan_swapped(self.pagemap.number, start, end)
        return ranges.subtract(told, ranges.union(there)), ranges.intersect(told, ranges.union(doubtful))

    def guarded(self, spans: Ranges) -> Range | None:
        """Return a range with guard pages among those that came up since the watch began, or None.

        What was there before has been looked at then.
        """
        known = ranges.union([*self.covered, *self._given_up_early])
        pieces = ranges.subtract(ranges.union(spans), known)
        return next((piece for piece in pieces if pagemap.has_guard_pages(self.pagemap.number, *piece)), None)

    def written(self) -> list[Range]:
        """Estimate what a scan would find now. Changes nothing."""
        found: list[Range] = []
        for start, end in self.covered:
            with contextlib.suppress(PermissionError, ProcessLookupError):
                found += pagemap.scan_written(self.pagemap.number, start, end)
        return ranges.subtract(found, self._holes)

    def _scan_mapping(self, span: Range, found: _Scan) -> None:
        for piece in ranges.intersect([span], self.covered):
            if not found.covered(piece):
                self.covered = ranges.subtract(self.covered, [piece])
        for piece in ranges.subtract([span], self.covered):
            if not found.protect:
                found.untracked(piece)
            elif self._register(span) and found.untracked(piece):
                self.covered = ranges.union([*self.covered, piece])

    def _register(self, mapping: Range) -> bool:
        """Have a mapping tracked; one that cannot be, or has gone meanwhile, waits for the end."""
        try:
            userfaultfd.register(self.uffd.number, *mapping, userfaultfd.UFFDIO_REGISTER_MODE_WP)
        except OSError:
            return False
        return True


class _Scan:
    """One pass over an address space."""

    def __init__(self, table: Fd, *, protect: bool) -> None:
        self._table = table
        self.protect = protect
        self.own: list[Range] = []  # pages to be told, in order of address
        self.absent: list[Range] = []  # nothing of its own in a tracked range, as far as it was written
        self.new: list[Range] = []  # ranges that were not tracked
        self.torn: list[Range] = []  # ranges to be told from the start

    def covered(self, span: Range) -> bool:
        """Scan a range that was tracked; tell whether it still is. If not, nothing is noted."""
        try:
            written = pagemap.scan_written(self._table, *span)
        except PermissionError:
            return False
        own: list[Range] = []
        try:
            for start, end in ranges.coalesce(written, _GAP_BYTES):
                own += self._own(start, end, written=True)
        except PermissionError:
            # The program has mapped something there just now, and we cannot know what was protected
            # already without having been told: nothing of this range counts as told any more.
            self.torn.append(span)
            return True
        self.own += own
        self.absent += ranges.subtract(written, own)
        return True

    def untracked(self, piece: Range) -> bool:
        """Scan a range of which nothing is known; tell whether it could be protected, where asked for."""
        try:
            own = self._own(*piece, written=False)
        except PermissionError:
            return False
        self.own += own
        self.new.append(piece)
        return True

    def _own(self, start: int, end: int, *, written: bool) -> list[Range]:
        found = pagemap.scan_present(self._table, start, end, written=written, protect=self.protect)
        return [(first, beyond) for first, beyond, own in found if own]


def _neighbours(spans: Ranges) -> Iterator[list[Range]]:
    """Yield the mappings in groups without a gap: one call scans a group."""
    group: list[Range] = []
    for span in spans:
        if group and span[0] != group[-1][1]:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def spans_of(process: ProcessView) -> list[Range]:
    """Return the ranges of the mappings whose pages may be the process's own."""
    return [
        (mapping.start, mapping.end)
        for mapping in process.mappings
        if not mapping.shared and not memory.kernel_owned(mapping) and mapping.path != "[vsyscall]"
    ]


def backed_of(process: ProcessView) -> list[Range]:
    """Return the ranges of private mappings that lie over a file."""
    return [
        (mapping.start, mapping.end)
        for mapping in process.mappings
        if mapping.inode and not mapping.shared and not memory.kernel_owned(mapping)
    ]


def anonymous_of(process: ProcessView) -> list[Range]:
    """Return the ranges of private mappings that lie over nothing."""
    return ranges.subtract(spans_of(process), backed_of(process))


def image_of(process: ProcessView) -> tuple[int, ...]:
    """Return what tells a program from another that has taken its place."""
    found = process.stat
    return (found.starttime, found.start_code, found.start_stack, found.arg_start, found.env_start)


def watch(processes: Iterable[ProcessView], tree: FrozenTree, found: GadgetsOf) -> list[Tracked]:
    """Begin to watch stopped processes. Each stays stopped for one injected call.

    `found` gives what is known for making calls inside.

    Raises:
        OSError: This kernel cannot: EINVAL, no WP_ASYNC; EPERM, no userfaultfd for us.
    """
    made: list[Tracked] = []
    try:
        # One by one: what was made before one fails must be closed.
        made.extend(_watch(process, tree.leader(process.pid), found(process)) for process in processes)
    except BaseException:
        for each in made:
            each.close()
        raise
    return made


def _watch(process: ProcessView, leader: Tracee, found: Gadgets | None) -> Tracked:
    with contextlib.ExitStack() as undo:
        uffd = undo.enter_context(_made_inside(leader, _FLAGS, found))
        userfaultfd.enable(uffd.number, _FEATURES)
        flags = os.O_RDONLY | os.O_CLOEXEC
        table = undo.enter_context(OwnedFd(os.open(f"/proc/{process.pid}/pagemap", flags)))
        undo.pop_all()
        return Tracked(process.pid, image_of(process), uffd, table)


def _made_inside(leader: Tracee, flags: int, found: Gadgets | None) -> OwnedFd:
    """Have a stopped process make a userfaultfd, and take it over."""
    known = gadgets.checked(found, leader.pid)
    with calls.opened(leader, gadgets=known) as workshop, pidfd.pidfd_open(leader.pid) as process:
        try:
            number = workshop.call(leader, "userfaultfd", flags)
            try:
                return pidfd.pidfd_getfd(process.number, Fd(number))
            finally:
                workshop.call(leader, "close", number)
        finally:
            leader.restore()


class Watch:
    """A process tree under watch."""

    def __init__(self) -> None:
        self._tracked: dict[Pid, Tracked] = {}

    def of(self, process: ProcessView) -> Tracked | None:
        """Return the watch over a process, None if there is none yet for the program that it runs."""
        known = self._tracked.get(process.pid)
        if known is not None and known.image != image_of(process):
            return None
        return known

    def update(self, root: Pid, processes: Sequence[ProcessView], found: GadgetsOf) -> None:
        """Begin to watch who is not yet, and forget who is gone.

        The whole tree is stopped for a moment if somebody is new. `found` gives what is known for making
        calls inside a process.

        Raises:
            OSError: This kernel cannot watch.
            GodwitError: The tree could not be stopped just now.
        """
        pids = {process.pid for process in processes if not process.zombie}
        for pid in [pid for pid in self._tracked if pid not in pids]:
            self._tracked.pop(pid).close()
        new = [process for process in processes if not process.zombie and self.of(process) is None]
        if not new:
            return
        with freeze.frozen(root) as tree:
            alive = [process for process in new if process.pid in tree.tracees]
            for made in watch(alive, tree, found):
                stale = self._tracked.pop(made.pid, None)
                if stale is not None:
                    stale.close()
                self._tracked[made.pid] = made

    def pids(self) -> frozenset[Pid]:
        """Return who is watched."""
        return frozenset(self._tracked)

    def close(self) -> None:
        """End the watch."""
        for each in self._tracked.values():
            each.close()
        self._tracked.clear()
