"""The memory of a tree on its way, while the program runs and once it is frozen.

What changed is found by `tracking` for the private pages of processes, and by `sums` for memory objects.
Nothing is ever taken for sent that could not be read or that the destination has lost again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from godwit.engine import freeze, pages, plan, ranges, reshape, sums
from godwit.engine.capture import Capture
from godwit.engine.pages import PageSource
from godwit.engine.ranges import Range, RangeSet
from godwit.engine.sums import Sums
from godwit.engine.tracking import Changes, Tracked, Watch, anonymous_of, backed_of
from godwit.engine.view import MemoryObject, ProcessView, TreeView
from godwit.errors import RefusedError
from godwit.linux import pagemap
from godwit.migrate import convergence, lanes, leaving
from godwit.migrate.convergence import Round
from godwit.migrate.lanes import Lanes
from godwit.migrate.pageserver import Left
from godwit.migrate.pagestream import PageStream, in_chunks
from godwit.resources import objects
from godwit.resources.objects import ObjectEntry
from godwit.resources.outline import OutlineEntry
from godwit.resources.process import ProcessEntry
from godwit.types import PAGE_SIZE, OwnedFd, Pid, page_ceil
from godwit.wire import frames


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a round began."""

    began: float  # time.monotonic
    pages: int  # sent before it
    bytes_sent: int  # over the line before it


@dataclass(slots=True)
class Copying:
    """What the destination has of the tree's memory, and what it lacks."""

    stream: PageStream
    lanes: Lanes = field(default_factory=Lanes)
    watch: Watch = field(default_factory=Watch)
    _sums: dict[int, Sums] = field(default_factory=dict[int, Sums])
    _objects: dict[int, ObjectEntry] = field(default_factory=dict[int, ObjectEntry])  # as they are there
    _begun: bool = False
    _direct: set[Pid] = field(default_factory=set[Pid])  # who was known to read with O_DIRECT

    def close(self) -> None:
        """End the watch over the program, and close the lanes."""
        self.lanes.close()
        self.watch.close()

    def adapt(self, tree: TreeView, before: OutlineEntry | None, now: OutlineEntry) -> None:
        """Take note that the destination goes from one outline to the next, and what it loses by that."""
        kept = reshape.surviving(before, now) if before is not None else {}
        for process in tree.processes:
            tracked = self.watch.of(process)
            if tracked is not None:
                tracked.covered = ranges.intersect(tracked.covered, kept.get(process.status.nspid[-1], []))
        keep = before is not None and reshape.adaptable(before, now)
        wanted = {entry.object_id: entry for entry in now.objects}
        for object_id, known in list(self._sums.items()):
            had, has = self._objects.get(object_id), wanted.get(object_id)
            if keep and had is not None and has is not None and objects.resizable(had, has):
                known.resize(had.size_bytes, has.size_bytes)
            else:
                del self._sums[object_id]
        self._objects = wanted

    def round(self, tree: TreeView, shape: OutlineEntry) -> None:
        """Send what the destination lacks, while the program runs on. The destination has this shape."""
        self.watch.update(tree.root.pid, tree.processes, tree.gadgets_of)
        self._doubt_direct(tree)
        for index, tracked, changes in self._scanned(tree, shape):
            self._send_living(index, tracked, changes)
        sizes = {entry.object_id: entry.size_bytes for entry in shape.objects}
        for found in tree.objects.values():
            if found.object_id in sizes:
                self._send_object(found, sizes[found.object_id])
        self._begun = True

    def _scanned(self, tree: TreeView, shape: OutlineEntry) -> list[tuple[int, Tracked, Changes]]:
        """Scan every process that is watched."""
        found: list[tuple[int, Tracked, Changes]] = []
        with _still(tree):
            for index, process in enumerate(_living(tree)):
                tracked = self.watch.of(process)
                if tracked is None:
                    continue
                try:
                    # Only what the destination knows of: a restore's notes, for one, are not the program's.
                    spans = pages.spans_of(shape.spaces[index].vmas)
                    changes = tracked.scan(spans, backed_of(process), protect=True)
                except ProcessLookupError:
                    tracked.covered = []  # It has ended.
                else:
                    found.append((index, tracked, changes))
        return found

    def written_bytes(self, tree: TreeView) -> int:
        """Estimate what a round would have to send now, memory objects left out."""
        watched = [tracked for process in _living(tree) if (tracked := self.watch.of(process))]
        return sum(ranges.total(tracked.written()) for tracked in watched)

    def measure(self, tree: TreeView, since: Mark) -> Round:
        """Return what a round was like that has just come to its end."""
        seconds, scanned = time.monotonic() - since.began, time.monotonic()
        dirty_pages = self.written_bytes(tree) // PAGE_SIZE
        return Round(
            pages=self.pages - since.pages,
            bytes=self.bytes_sent - since.bytes_sent,
            seconds=seconds,
            dirty_pages=dirty_pages,
            scan_s=time.monotonic() - scanned,
        )

    def mark(self) -> Mark:
        """Return where a round begins."""
        return Mark(time.monotonic(), self.pages, self.bytes_sent)

    @property
    def pages(self) -> int:
        """How many pages have been sent so far."""
        return self.stream.pages + self.lanes.pages

    @property
    def bytes_sent(self) -> int:
        """How much has gone over the line so far, over all connections."""
        return self.stream.channel.bytes_sent + self.lanes.bytes_sent

    def last(self, tree: TreeView, captured: Capture) -> None:
        """Send all that the destination lacks of the frozen tree.

        Raises:
            RefusedError: See `_refuse_guards`.
        """
        self._refuse_guards(tree, captured)
        self._doubt_direct(tree)
        for index, process in enumerate(_living(tree)):
            changes = self._last_changes(process, captured.sources[index], [])
            self._drop(index, changes.gone)
            self._send_process(index, process.pid, changes.dirty)
        self._last_objects(captured)

    def give_up_dense(self, tree: TreeView, shape: OutlineEntry) -> None:
        """Give up, before a freeze, what so much is being written to that it has to go over again anyway.

        To drop it at the destination takes 60 ms for a GiB, and to look closer at it here nearly as long.
        """
        for index, process in enumerate(_living(tree)):
            tracked = self.watch.of(process)
            if tracked is None:
                continue
            known = pages.spans_of(shape.spaces[index].vmas)
            dense = ranges.intersect(leaving.dense(tracked.written()), anonymous_of(process))
            dense = ranges.intersect(dense, ranges.union(known))
            if dense:
                self.stream.drop((index, 0), dense)
                tracked.give_up(dense)

    def last_in_part(self, tree: TreeView, captured: Capture, along_pages: int) -> dict[int, Left]:
        """Send what must go along with the frozen tree; return what stays behind, by index of the process.

        Raises:
            RefusedError: See `_refuse_guards`.
        """
        self._refuse_guards(tree, captured)
        self._doubt_direct(tree)
        left: dict[int, Left] = {}
        for index, process in enumerate(_living(tree)):
            entry, source = captured.tree.processes[index], captured.sources[index]
            wholesale = self._wholesale(process, entry)
            changes = self._last_changes(process, source, wholesale)
            parts = leaving.divide(entry, changes.dirty, wholesale, along_pages)
            # What goes along of a range that nobody looked at may be absent here and old there.
            unseen = ranges.intersect(parts.along, wholesale)
            gone = ranges.subtract(ranges.union([*changes.gone, *unseen]), parts.behind)
            self._drop(index, gone)
            if parts.behind:
                self.stream.leave(index, parts.behind)
                table = OwnedFd(os.open(f"/proc/{process.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC))
                left[index] = Left(process.pid, table, RangeSet(parts.behind))
            own = self._own_along(source, parts.along, wholesale)
            self._send_process(index, process.pid, own)
        self._last_objects(captured)
        return left

    def _doubt_direct(self, tree: TreeView) -> None:
        """Have everything told again of a process that has only now begun to read with O_DIRECT.

        The last scan was made while it ran, and may have protected what a device was just writing: see
        `_still`.
        """
        now = {
            pid for file in tree.files if file.info.flags & os.O_DIRECT for pid, _ in file.holders
        } - self._direct
        for process in _living(tree):
            tracked = self.watch.of(process) if process.pid in now else None
            if tracked is not None:
                tracked.forget(tracked.covered)
        self._direct |= now

    def _refuse_guards(self, tree: TreeView, captured: Capture) -> None:
        """Refuse guard pages that a program has made meanwhile: they show in no list of mappings."""
        for index, process in enumerate(_living(tree)):
            tracked = self.watch.of(process)
            found = tracked.guarded(captured.sources[index].spans) if tracked is not None else None
            if found is not None:
                raise RefusedError([plan.guard_refusal(f"pid {process.pid}")])

    def _wholesale(self, process: ProcessView, entry: ProcessEntry) -> list[Range]:
        """Return the ranges of which the destination has nothing worth keeping."""
        stays = leaving.can_stay(entry)
        tracked = self.watch.of(process)
        if tracked is None:
            return stays
        return leaving.large(ranges.subtract(stays, tracked.covered))

    @staticmethod
    def _own_along(source: PageSource, along: Sequence[Range], wholesale: Sequence[Range]) -> list[Range]:
        """Keep of what goes along only pages that are there: inside of `wholesale` nobody has looked yet."""
        unseen = ranges.intersect(along, wholesale)
        seen = ranges.subtract(along, wholesale)
        there = [run for start, end in unseen for run in source.runs_within(start, end)]
        return ranges.union([*seen, *there])

    def _last_objects(self, captured: Capture) -> None:
        for source in captured.sources:
            # After rounds, new ones are noted too: an image may follow that goes on from here.
            if source.pid is None and (self._begun or source.object_id in self._sums):
                self._send_object_of(source.object_id, source.descriptor, source.spans[0][1])
            elif source.pid is None:
                self._send_whole_object(source)

    def _last_changes(self, process: ProcessView, source: PageSource, skip: Sequence[Range]) -> Changes:
        """Return what the destination lacks and has too much, outside of some ranges."""
        spans = ranges.subtract(source.spans, skip)
        tracked = self.watch.of(process)
        if tracked is not None:
            return tracked.scan(spans, backed_of(process), protect=False)
        dirty = [run for start, end in spans for run in source.runs_within(start, end)]
        return Changes(dirty, spans if self._begun else [])

    # --- processes ----------------------------------------------------------------------------

    def _send_living(self, index: int, tracked: Tracked, changes: Changes) -> None:
        self._drop(index, changes.gone)

        lost: list[Range] = []

        def read(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            could, length = pages.read_living(tracked.pid, runs, into)
            if could is not runs:
                lost.extend(ranges.subtract(runs, could))
            return could, length

        if self.lanes and ranges.total(changes.dirty) >= lanes.WORTH_BYTES:
            self.lanes.send(self.stream, (index, 0), in_chunks(changes.dirty), read)
        else:
            self.stream.send((index, 0), in_chunks(changes.dirty), read)
        if lost:
            # Unmapped since it was found, or not to be read: told again if it is still there.
            tracked.forget(ranges.union(lost))

    def _send_process(self, index: int, pid: Pid, runs: Sequence[Range]) -> None:
        def read(wanted: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            return wanted, pages.read_frozen(pid, wanted, into)

        self.stream.send((index, 0), in_chunks(runs), read)

    def _drop(self, index: int, gone: Sequence[Range]) -> None:
        if self._begun and gone:
            self.stream.drop((index, 0), ranges.union(gone))

    # --- memory objects -----------------------------------------------------------------------

    def _send_object(self, found: MemoryObject, size_bytes: int) -> None:
        try:
            descriptor = OwnedFd(os.open(found.proc_path, os.O_RDONLY | os.O_CLOEXEC))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return  # The mapping or descriptor that led there has gone: the next look finds another, or none.
        with descriptor:
            if _is(descriptor, found):
                self._send_object_of(found.object_id, descriptor, size_bytes)

    def _send_object_of(self, object_id: int, descriptor: OwnedFd, size_bytes: int) -> None:
        known = self._sums.setdefault(object_id, Sums())
        changes = known.scan(descriptor.number, size_bytes, memoryview(self.stream.buffer))
        owner = (frames.OBJECT, object_id)
        gone = ranges.intersect(changes.gone, [(0, page_ceil(size_bytes))])
        if gone:
            self.stream.drop(owner, gone)

        def read(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            return runs, known.read(descriptor.number, runs, into)

        self.stream.send(owner, sums.groups(changes.dirty, frames.CHUNK_BYTES), read)

    def _send_whole_object(self, source: PageSource) -> None:
        def read(runs: Sequence[Range], into: memoryview) -> tuple[Sequence[Range], int]:
            return runs, pages.read_pages(source, runs, into)

        self.stream.send((frames.OBJECT, source.object_id), in_chunks(source.runs()), read)


def _living(tree: TreeView) -> Iterator[ProcessView]:
    """Yield the processes that have an address space, as outlines and trees count them."""
    return (process for process in tree.processes if not process.zombie)


def _still(tree: TreeView) -> contextlib.AbstractContextManager[object]:
    """Have a tree that reads with O_DIRECT stand still for the length of a scan.

    The device writes into pages that were marked as written when the read(2) began. A scan in between would
    protect them, and nothing would show what the device writes after it. A stopped thread is in no read.
    """
    if any(file.info.flags & os.O_DIRECT for file in tree.files):
        return freeze.frozen(tree.root.pid)
    return contextlib.nullcontext()


def _is(descriptor: OwnedFd, found: MemoryObject) -> bool:
    """Tell whether a link in /proc still leads to the object that it led to."""
    status = os.fstat(descriptor.number)
    return (status.st_dev, status.st_ino) == found.key


def fixed_freeze_s(tree: TreeView) -> float:
    """Estimate what a freeze of a tree costs without any page."""
    living = list(_living(tree))
    return convergence.fixed_freeze_s(
        len(living),
        sum(len(process.tids) for process in living),
        sum(len(process.links) for process in living),
        sum(len(process.mappings) for process in living),
    )


def can_track(pid: Pid) -> bool:
    """Tell whether this kernel can note what a process writes. Stops nothing."""
    with OwnedFd(os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)) as table:
        return pagemap.can_scan(table.number)
